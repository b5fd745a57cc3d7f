"""`sorax app`: a page on this machine with every mode of `sorax sample`."""

import importlib.util
import ipaddress
import os

from sorax import backend
from sorax.errors import UserError


def add_verb(verbs):
    text = "open a page in the browser with every mode of `sorax sample`, served from this machine"
    verb = verbs.add_parser("app", help=text, description=text)
    verb.set_defaults(run=app_verb, takes_overrides=False)
    verb.add_argument("--run", required=True, dest="workdir", help="run folder")
    verb.add_argument("--out", default="", metavar="FOLDER", help="folder of what is made, shown to who opens the "
                      "page (default: RUN/app)")  # fmt: skip
    verb.add_argument("--weights", choices=("ema", "raw"), default="ema")
    verb.add_argument("--mesh", default="", metavar="AXIS=N,...", help="devices, as in `sorax sample`")
    verb.add_argument("--expander", default="", help="run of a model that makes prompts detailed (default: "
                      "RUN/expander)")  # fmt: skip
    served = verb.add_argument_group("who can open it")
    served.add_argument("--host", default="127.0.0.1", help="address to listen on (default: %(default)s, this machine "
                        "alone); others need --auth")  # fmt: skip
    served.add_argument("--port", type=int, default=0, help="default: the first free one from 7860 on")
    served.add_argument("--auth", default="", metavar="FILE", help="who may: lines of USER:PASSWORD")
    served.add_argument("--max-upload", type=int, default=200, metavar="MB", help="size of a file that is given "
                        "(default: %(default)s)")  # fmt: skip
    served.add_argument("--max-seconds", type=float, default=60.0, metavar="S", help="longest video that is made, "
                        "at the frame rate of the run (default: %(default)g)")  # fmt: skip
    served.add_argument("--max-side", type=int, default=1280, metavar="PIXELS", help="longest side of a frame that is "
                        "made (default: %(default)s)")  # fmt: skip
    served.add_argument("--queue", type=int, default=16, metavar="N", help="most requests that wait; one is made at a "
                        "time (default: %(default)s)")  # fmt: skip


def app_verb(arguments, _):
    if importlib.util.find_spec("gradio") is None:
        raise UserError("sorax app needs gradio: pip install 'sorax[app]'")
    if not is_loopback(arguments.host) and not arguments.auth:
        raise UserError(f"--host {arguments.host} lets others open the page, and so use this machine: give --auth FILE "
                        "with lines of USER:PASSWORD, or leave --host out")  # fmt: skip
    if min(arguments.max_upload, arguments.max_side, arguments.queue) < 1 or not 0 <= arguments.port < 65536:
        raise UserError("--max-upload, --max-side and --queue are 1 at least, and --port is below 65536")
    if not arguments.max_seconds > 0:
        raise UserError(f"--max-seconds is {arguments.max_seconds:g}: it is above 0")
    users = read_users(arguments.auth) if arguments.auth else None
    from sorax.app import App
    from sorax.app_page import serve
    from sorax.cli_sample import mesh_of
    from sorax.runs import load_run

    backend.keep_programs()
    words = ["--run", arguments.workdir]
    words += ["--weights", arguments.weights] if arguments.weights != "ema" else []
    words += ["--mesh", arguments.mesh] if arguments.mesh else []
    out = arguments.out or os.path.join(arguments.workdir, "app")
    app = App(load_run(arguments.workdir, arguments.weights), words, out, arguments.expander, mesh_of(arguments.mesh),
              max_seconds=arguments.max_seconds, max_side=arguments.max_side)  # fmt: skip
    serve(app, host=arguments.host, port=arguments.port, users=users, max_upload=arguments.max_upload,
          max_queue=arguments.queue)  # fmt: skip


def is_loopback(host: str) -> bool:
    """Whether an address to listen on is of this machine alone."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def read_users(path: str) -> list[tuple[str, str]]:
    """(user, password) of each line of a file. Raises UserError if there are none."""
    try:
        with open(path, encoding="utf-8") as f:
            lines = [line.rstrip("\r\n") for line in f if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--auth {path!r} cannot be read ({error}): write lines of USER:PASSWORD to it") from error
    users = [(user, password) for user, _, password in (line.partition(":") for line in lines)]
    if not users or not all(user and password for user, password in users):
        raise UserError(f"--auth {path!r} is not of lines of USER:PASSWORD")
    return users
