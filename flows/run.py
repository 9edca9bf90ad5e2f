"""Run a flow from the command line: start a server, run the flow, and report errors in one message."""

from __future__ import annotations

import importlib.util
import os
import sys

from flows.server import ServerError, connect
from stacklm.pipeline.project import Project


def run(name: str, models: list[str] | None = None, experiment: str | None = None, dask: str | None = None) -> int:
    """Run a flow by name in the project of the current directory, and return the exit code.

    It runs for the named `models` or all; the flow `lab` runs one `experiment`, locally or on `dask`. Prints the outcome of
    each stage or trial; errors go to standard error, with the message of the stage that failed. Raises `ParamsError` for an
    experiment that cannot run.
    """
    project, server = Project.find(), None
    if name == "lab":
        from stacklm.pipeline.lab import Files

        Files(project, experiment or "").check()  # before a server is started
        if dask and not importlib.util.find_spec("prefect_dask"):
            return _fail("--dask needs additional packages: `pip install -e '.[dask]'`", code=2)
    elif experiment or dask:
        return _fail(f"the flow {name} has no {'experiment' if experiment else '--dask'}; only the flow lab takes one", code=2)
    try:
        server = connect(project.state / "prefect")
        from flows.pretrain import FLOWS

        if name != "lab" and name not in FLOWS:
            return _fail(f"no flow {name!r}; the flows are {', '.join(sorted([*FLOWS, 'lab']))}", code=2)
        if server:
            server.wait()
            server.watch(_server_died)
        if name == "lab":
            from flows.lab import lab  # imports torch and scipy, which no other flow needs

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
        return _fail(f"{error} (the server set by PREFECT_API_URL or your Prefect profile)")
    except Exception as error:
        import httpx  # imported here because it is slow

        if server or not isinstance(error, httpx.TransportError):
            raise
        return _fail(f"the Prefect server at {os.environ.get('PREFECT_API_URL', 'your profile')} no longer answers ({error})")
    return 0 if state.is_completed() else _fail(str(state.message))


def _server_died() -> None:
    """Exit immediately, since Prefect would only wait for its server. The stages notice that this process has ended."""
    _fail("Prefect's server died; the same command resumes from the last checkpoint")
    sys.stdout.flush()
    os._exit(1)


def _fail(message: str, code: int = 1) -> int:
    print(f"stacklm: {message}", file=sys.stderr, flush=True)
    return code
