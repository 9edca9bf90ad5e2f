"""Running a flow from the command line: a server, the flow, and one clear line where something went wrong."""

from __future__ import annotations

import importlib.util
import os
import sys

from flows.server import ServerError, connect
from stacklm.pipeline.project import Project


def run(name: str, models: list[str] | None = None, experiment: str | None = None, dask: str | None = None) -> int:
    """Run the flow of that name in the project around the current directory; the exit code.

    It is for the named `models` or all; the flow `lab` is for one `experiment`, here or on `dask`. Prints how each stage or
    trial went; a failure goes to standard error, in the words of the stage that failed. Raises `ParamsError` for an
    experiment that cannot run.
    """
    project, server = Project.find(), None
    if name == "lab":
        from stacklm.pipeline.lab import Files

        Files(project, experiment or "").check()  # before a server is started
        if dask and not importlib.util.find_spec("prefect_dask"):
            return _fail("--dask needs more packages: `pip install -e '.[dask]'`", code=2)
    elif experiment or dask:
        return _fail(f"the flow {name} has no {'experiment' if experiment else '--dask'}; only the flow lab has one", code=2)
    try:
        server = connect(project.state / "prefect")
        from flows.pretrain import FLOWS

        if name != "lab" and name not in FLOWS:
            return _fail(f"no flow {name!r}; the flows are {', '.join(sorted([*FLOWS, 'lab']))}", code=2)
        if server:
            server.wait()
            server.watch(_server_died)
        if name == "lab":
            from flows.lab import lab  # with torch and scipy, which no other flow needs

            state = lab(experiment=experiment, dask=dask, return_state=True)
        else:
            state = FLOWS[name](models=models or None, return_state=True)
    except KeyboardInterrupt:
        return _fail("interrupted; the same command resumes from the last checkpoint", code=130)
    except ServerError as error:
        return _fail(str(error))
    except RuntimeError as error:
        if server:
            raise
        return _fail(f"{error} (the server that you named by PREFECT_API_URL or your Prefect profile)")
    except Exception as error:
        import httpx  # here, since it is slow to import

        if server or not isinstance(error, httpx.TransportError):
            raise
        return _fail(f"the Prefect server at {os.environ.get('PREFECT_API_URL', 'your profile')} no longer answers ({error})")
    return 0 if state.is_completed() else _fail(str(state.message))


def _server_died() -> None:
    """End at once: all that Prefect would still do is to wait for its server. The stages see that this process is gone."""
    _fail("Prefect's server died; the same command resumes from the last checkpoint")
    sys.stdout.flush()
    os._exit(1)


def _fail(message: str, code: int = 1) -> int:
    print(f"stacklm: {message}", file=sys.stderr, flush=True)
    return code
