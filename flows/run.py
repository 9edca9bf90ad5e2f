"""Running a flow from the command line: a server, the flow, and one clear line where something went wrong."""

from __future__ import annotations

import sys

from flows.server import ServerError, connect
from stacklm.pipeline.project import Project


def run(name: str) -> int:
    """Run the flow of that name in the project around the current directory; the exit code.

    Prints how each stage went; a failure goes to standard error, in the words of the stage that failed.
    """
    server = None
    try:
        server = connect(Project.find().state / "prefect")
        from flows.pretrain import FLOWS

        if name not in FLOWS:
            return _fail(f"no flow {name!r}; the flows are {', '.join(sorted(FLOWS))}", code=2)
        if server:
            server.wait()
        state = FLOWS[name](return_state=True)
    except KeyboardInterrupt:
        return _fail("interrupted; the same command goes on from the last checkpoint", code=130)
    except ServerError as error:
        return _fail(str(error))
    except RuntimeError as error:
        if server:
            raise
        return _fail(f"{error} (the server that you named by PREFECT_API_URL or your Prefect profile)")
    return 0 if state.is_completed() else _fail(state.message)


def _fail(message: str, code: int = 1) -> int:
    print(f"stacklm: {message}", file=sys.stderr)
    return code
