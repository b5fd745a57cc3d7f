"""The page of `sorax app` in Gradio: fields, progress, results. What they do is in `sorax.app`.

Nothing is loaded from elsewhere or sent anywhere: no fonts, no statistics, and the browser is told so.
"""

import contextlib
import dataclasses
import html
import json
import os
import secrets
import tempfile
import threading

from sorax.app import CANCELLING, MODES, App, Form, Report
from sorax.errors import UserError
from sorax.sampler import SOLVERS

KEYFRAMES = 4  # fields for them
PROMPT_CHARACTERS = 4000
# Fields that only some modes show; all others are always there.
SHOWN = dict(
    prompt=MODES.keys() - {"shots"}, shots={"shots"}, cut={"shots"}, image={"image"}, keyframes={"keyframes"},
    video={"extend", "loop_clip", "connect", "edit", "inpaint"}, second={"connect"}, mask={"inpaint"},
    extend={"extend"}, strength={"edit"}, seconds=MODES.keys() - {"picture"},
)  # fmt: skip
HINTS = dict(
    text="A prompt alone.", picture="One frame.", image="The image is the first frame.",
    keyframes="Images at times of the video: 0, 12 (a frame) or 1.5s.",
    extend="New frames behind or before a clip; the length is that of the new frames.",
    loop="The last frame leads to the first.", loop_clip="New frames lead from the clip's end to its beginning.",
    connect="New frames between two clips; the length is that of the new frames.",
    edit="The clip is noised and denoised: a strength of 0.01 hardly changes it, 0.99 leaves hardly anything.",
    inpaint="The clip is made anew where the mask, an image or a video, is white.",
    shots="Several prompts, each with its time: one a line, the first at 0.",
)  # fmt: skip
# The button that trims a video would load a program from elsewhere.
CSS = """
.gradio-container { max-width: 1500px !important; }
#result video, #result img { image-rendering: pixelated; }
#result .image-frame, #result .image-frame img { width: 100%; height: 100%; object-fit: contain; }
button[aria-label="Trim video to selection"] { display: none; }
#status .bar { height: .6rem; border-radius: .3rem; background: var(--neutral-200, #ddd); overflow: hidden; }
#status .bar div { height: 100%; background: var(--color-accent, #f97316); }
#status p { margin: .2rem 0; overflow-wrap: anywhere; }
#status .error { color: var(--error-text-color, #b91c1c); font-weight: 600; }
#status .note { color: var(--body-text-color-subdued); }
"""
POLICY = ("default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; style-src 'self' 'unsafe-inline'; "
          "img-src 'self' data: blob:; media-src 'self' data: blob:; font-src 'self' data:; worker-src 'self' blob:; "
          "connect-src 'self' data: blob:; frame-ancestors 'none'")  # fmt: skip


class Guard:
    """ASGI middleware: the browser loads from this server alone; bodies are bounded; other names of the host, by which
    a foreign page could reach a server on this machine, are refused.

    hosts: names that are answered to; None: any.
    """

    def __init__(self, app, max_bytes: int, hosts: frozenset[str] | None):
        self.app, self.max_bytes, self.hosts = app, max_bytes, hosts

    async def __call__(self, scope, receive, send):
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        headers = {name: value.decode("latin-1") for name, value in scope["headers"]}
        host = headers.get(b"host", "").rpartition(":")[0] or headers.get(b"host", "")
        length = headers.get(b"content-length", "" if b"transfer-encoding" in headers else "0")
        if self.hosts is not None and host not in self.hosts:
            return await _refuse(send, 400, "this host is not served")
        if not length.isdecimal():
            return await _refuse(send, 411, "the length of what is sent must be said")
        if int(length) > self.max_bytes:
            return await _refuse(send, 413, "what is sent is too large")

        async def guarded(message):
            if message["type"] == "http.response.start":
                extra = [(b"content-security-policy", POLICY.encode()), (b"referrer-policy", b"no-referrer")]
                message = message | dict(headers=[*message.get("headers", ()), *extra])
            await send(message)

        await self.app(scope, receive, guarded)


async def _refuse(send, status, text):
    await send(dict(type="http.response.start", status=status, headers=[(b"content-type", b"text/plain")]))
    await send(dict(type="http.response.body", body=text.encode()))


def serve(app: App, *, host: str, port: int, users=None, max_upload: int = 200, max_queue: int = 16, block=True):
    """Serves the page until it is interrupted; with block=False returns (url, what `closing` takes besides) at once.

    Args:
        port: 0: the first free one from 7860 on. users: (name, password) of who may open it; None: all who reach it.
        max_upload: of a file, in MB. max_queue: most requests that wait.

    Raises:
        UserError: the address cannot be listened on.
    """
    from sorax.cli_app import is_loopback

    uploads = tempfile.TemporaryDirectory(prefix="sorax-app-")
    os.environ.update(GRADIO_ANALYTICS_ENABLED="False", GRADIO_TEMP_DIR=uploads.name, GRADIO_RUN_HISTORY="False",
                      HF_HUB_DISABLE_TELEMETRY="1")  # fmt: skip
    from starlette.middleware import Middleware

    hosts = frozenset({"localhost", "127.0.0.1", "[::1]", host}) if is_loopback(host) else None
    guard = Middleware(Guard, max_bytes=max_upload * 10**6 + 10**5, hosts=hosts)
    blocks = page(app)
    blocks.queue(max_size=max_queue, default_concurrency_limit=1)
    try:
        _, url, _ = blocks.launch(
            server_name=host, server_port=port or None, auth=users, prevent_thread_lock=True, quiet=True, share=False,
            inbrowser=False, allowed_paths=[os.path.abspath(app.out)], max_file_size=max_upload * 10**6,
            footer_links=[], show_error=True, ssr_mode=False, enable_monitoring=False, mcp_server=False, pwa=False,
            app_kwargs=dict(middleware=[guard]), theme=_theme(), css=CSS,
        )  # fmt: skip
    except (OSError, ValueError) as error:
        raise UserError(f"--host {host} --port {port or 7860}: {error}; name another one") from error
    if not block:
        return url, (blocks, uploads)
    print(f"{url} (Ctrl-C closes it); results: {app.out}", flush=True)
    with closing(app, blocks, uploads), contextlib.suppress(KeyboardInterrupt):
        threading.Event().wait()
    print("closed")


@contextlib.contextmanager
def closing(app: App, blocks, uploads):
    """Ends a page at the end: what is being made is cancelled, what was uploaded is deleted."""
    try:
        yield
    finally:
        app.close()
        blocks.close(verbose=False)
        uploads.cleanup()


def _theme():
    import gradio as gr

    system = ["system-ui", "sans-serif"]
    return gr.themes.Default(font=system, font_mono=["ui-monospace", "monospace"])


def page(app: App):
    """The page as `gradio.Blocks`."""
    import gradio as gr

    frames, height, width, fps = app.run.usual_shape()
    how = app.run.sampling()
    name = os.path.basename(os.path.abspath(app.run.workdir))
    with gr.Blocks(title=f"sorax: {name}", analytics_enabled=False, delete_cache=(3600, 86400)) as blocks:
        gr.Markdown(f"## sorax\n`{name}`, step {app.run.step}: usually {frames} frames of {width}x{height}, {fps:g} "
                    "frames per second")  # fmt: skip
        ticket, shown = gr.State(None), gr.State(None)
        with gr.Row():
            with gr.Column(scale=5, min_width=320):
                fields, groups = _fields(gr, app, dict(fps=fps, **how))
                with gr.Row():
                    generate = gr.Button("Generate", variant="primary", elem_id="generate")
                    cancel = gr.Button("Cancel", variant="stop", visible=False, elem_id="cancel")
            with gr.Column(scale=6, min_width=320, elem_id="result"):
                status = gr.HTML(_status(None), elem_id="status")
                video = gr.Video(label="Result", interactive=False, autoplay=True, loop=True, height=380)
                picture = gr.Image(label="Result", interactive=False, visible=False, height=380, buttons=["download"])
                with gr.Column(visible=False) as about:
                    command = gr.Code(label="The same as a command", language="shell", interactive=False, lines=1,
                                      wrap_lines=True, show_line_numbers=False, elem_id="command")  # fmt: skip
                    reuse = gr.Button("Use this seed", size="sm", elem_id="reuse")
                    with gr.Accordion("Settings, as they are in the file", open=False):
                        facts = gr.JSON(show_label=False)
                gallery = gr.Gallery(label="Made since the start", columns=4, height=240, fit_columns=False,
                                     interactive=False, allow_preview=False, object_fit="contain",
                                     elem_id="gallery")  # fmt: skip
        names, components = list(fields), list(fields.values())
        show = [shown, video, picture, about, command, facts]
        buttons = [generate, cancel]

        def begin():
            """A ticket for one click, by which it can be cancelled."""
            return threading.Event(), *_busy(gr, True), _status(Report("waiting for its turn"))

        def run(stop, *values):
            try:
                form = _form(dict(zip(names, values)))
            except UserError as error:
                yield {status: _status(Report("", error=str(error)))}
                return
            with contextlib.closing(app.make(form, stop or threading.Event())) as reports:
                for report in reports:
                    if report.result:
                        found = dict(zip(show, _shown(gr, report.result)))
                        yield found | {status: _status(report), gallery: _gallery(app)}
                    else:
                        yield {status: _status(report)}

        def stop(event):
            if event is not None:
                event.set()
            return _status(Report(CANCELLING))

        def select(event: gr.SelectData):
            return _shown(gr, app.results[::-1][event.index])

        at_once = dict(queue=False, api_visibility="private", show_progress="hidden")
        in_turn = dict(concurrency_limit=1, concurrency_id="run", show_progress="hidden")
        ready = generate.click(begin, None, [ticket, *buttons, status], **at_once)
        made = ready.then(run, [ticket, *components], [status, gallery, *show], api_name="generate",
                          api_visibility="undocumented", **in_turn)  # fmt: skip
        made.then(lambda: _busy(gr, False), None, buttons, **at_once)
        made.failure(lambda: _status(Report("", error="it could not begin")), None, status, **at_once)
        cancel.click(stop, ticket, status, **at_once)
        gallery.select(select, None, show, **at_once)
        reuse.click(lambda result: (result.facts["seed"], False), shown, [fields["seed"], fields["new_seed"]],
                    **at_once)  # fmt: skip
        fields["mode"].change(lambda mode: _groups_of(gr, app, mode, groups), fields["mode"], list(groups.values()),
                              **at_once)  # fmt: skip
        blocks.load(lambda: _gallery(app), None, gallery, **at_once)
        if app.expands:

            def expand(prompt, seed):
                try:
                    found = app.expanded(prompt, int(seed or 0))
                except UserError as error:
                    return prompt, _status(Report("", error=str(error)))
                said = f"the prompt stays as it was: {found.reason}" if found.reason else "the prompt is detailed now"
                return found.text, _status(Report(said))

            groups["expand"].click(expand, [fields["prompt"], fields["seed"]], [fields["prompt"], status],
                                   api_visibility="private", **in_turn)  # fmt: skip
    return blocks


def _fields(gr, app, usual):
    """(name -> component; name -> what is shown in some modes alone)."""
    groups = {}
    fields = dict(mode=gr.Dropdown([(label, mode) for mode, label in MODES.items()], value="text", label="Mode",
                                   elem_id="mode"))  # fmt: skip
    groups["hint"] = gr.Markdown(HINTS["text"])

    def some(name, component):
        groups[name] = fields[name] = component

    some("prompt", gr.Textbox(label="Prompt", lines=2, max_length=PROMPT_CHARACTERS, elem_id="prompt"))
    groups["expand"] = gr.Button("Make the prompt detailed", size="sm", visible=app.expands)
    some("shots", gr.Textbox(label="Shots", lines=3, placeholder="0: a red circle moving right\n2s: a blue square",
                             max_length=PROMPT_CHARACTERS, visible=False))  # fmt: skip
    some("cut", gr.Checkbox(label="Cut: each shot is a scene of its own", visible=False))
    some("image", gr.Image(label="Image", type="filepath", image_mode=None, sources=["upload", "clipboard"],
                           visible=False, height=260, elem_id="image"))  # fmt: skip
    some("video", gr.Video(label="Clip", sources=["upload"], visible=False, height=260, elem_id="clip"))
    some("second", gr.Video(label="Second clip", sources=["upload"], visible=False, height=260))
    some("mask", gr.File(label="Mask: an image or a video, white where the clip is made anew", visible=False,
                         file_types=["image", "video"]))  # fmt: skip
    with gr.Group(visible=False) as groups["keyframes"]:
        for k in range(KEYFRAMES):
            with gr.Row():
                fields[f"key_{k}"] = gr.Image(label=f"Image {k + 1}", type="filepath", image_mode=None, height=130,
                                              sources=["upload", "clipboard"], min_width=140)  # fmt: skip
                fields[f"time_{k}"] = gr.Textbox(label="Time", placeholder="0, 12 or 1.5s", max_length=20,
                                                 min_width=100)  # fmt: skip
    some("extend", gr.Radio(["forward", "backward"], value="forward", label="Direction", visible=False))
    some("strength", gr.Slider(0.01, 0.99, value=0.6, step=0.01, label="Strength", visible=False))

    def short(label, placeholder):  # a gr.Number is never empty: it shows 0
        return gr.Textbox(label=label, placeholder=placeholder, max_length=20, min_width=100)

    with gr.Row():
        some("seconds", short("Seconds", "default"))
        fields["size"] = short("Size", "default")
        fields["fps"] = short("FPS", f"{usual['fps']:g}")
    with gr.Row(equal_height=True):
        fields["seed"] = gr.Number(label="Seed", value=0, precision=0, min_width=100, elem_id="seed")
        fields["new_seed"] = gr.Checkbox(label="A new seed each time", value=False, min_width=100)
    with gr.Accordion("Sampling", open=False):
        with gr.Row():
            fields["steps"] = gr.Number(label="Steps", value=usual["num_steps"], precision=0, min_width=100)
            fields["solver"] = gr.Dropdown(list(SOLVERS), value=usual["solver"], label="Solver", min_width=100)
            fields["guidance"] = gr.Number(label="Guidance", value=usual["guidance_scale"], min_width=100)
            fields["shift"] = gr.Number(label="Shift", value=usual["shift"], min_width=100)
        fields["negative_prompt"] = gr.Textbox(label="Negative prompt", max_length=PROMPT_CHARACTERS)
        with gr.Row():
            fields["guidance_interval"] = short("Guidance interval", "LO:HI")
            fields["guidance_rescale"] = short("Guidance rescale", "default 0")
            fields["reuse"] = short("Reuse", "default 0")
        with gr.Row():
            fields["window"] = short("Window, in frames", "default")
            fields["overlap"] = short("Overlap, in frames", "default")
    return fields, groups


def _groups_of(gr, app, mode, groups):
    """What a mode shows: updates of the groups, in their order."""
    modes = SHOWN | dict(expand=SHOWN["prompt"] if app.expands else ())
    return [gr.update(value=HINTS[mode]) if name == "hint" else gr.update(visible=mode in modes[name])
            for name in groups]  # fmt: skip


def _form(values) -> Form:
    """The form of the values of fields. Raises UserError for a keyframe without a time."""
    values = dict(values)
    if values.pop("new_seed"):
        values["seed"] = secrets.randbelow(2**31)
    keys = []
    for k in range(KEYFRAMES):
        path, at = values.pop(f"key_{k}"), (values.pop(f"time_{k}") or "").strip()
        if bool(path) != bool(at):
            raise UserError(f"keyframe {k + 1} has {'no time' if path else 'no image'}: give both, or none")
        if path:
            keys.append((at, path))
    if values["mode"] != "keyframes":
        keys = []
    names = [field.name for field in dataclasses.fields(Form)]
    for name in ("prompt", "shots", "seconds", "size", "fps", "negative_prompt", "guidance_interval",
                 "guidance_rescale", "reuse", "window", "overlap"):  # fmt: skip
        values[name] = (values[name] or "").strip()  # what nobody has touched is None
    values |= dict(keyframes=tuple(keys), seed=int(values["seed"] or 0))
    return Form(**{name: values[name] for name in names})


def _busy(gr, busy):
    return gr.update(interactive=not busy), gr.update(visible=busy)


def _shown(gr, result):
    """Values of what shows a result: itself, its video, its picture, the part about it, with command and facts."""
    path, facts = os.path.abspath(result.path), result.facts
    video, picture = (None, path) if result.is_picture else (path, None)
    return (result, gr.update(value=video, visible=bool(video)), gr.update(value=picture, visible=bool(picture)),
            gr.update(visible=True), facts["command"], json.loads(json.dumps(facts)))  # fmt: skip


def _gallery(app):
    """What was made, the newest first."""
    return [(os.path.abspath(result.path), f"seed {result.facts['seed']}") for result in app.results[::-1]]


def _status(report: Report | None) -> str:
    """A report as HTML."""
    if report is None:
        return '<div role="status"><p class="note">Nothing is being made.</p></div>'
    lines = []
    if report.error:
        lines.append(f'<p class="error">{html.escape(report.error)}</p>')
    elif report.result:
        facts = report.result.facts
        what = f"{facts['frames']} frames of " if facts["frames"] > 1 else ""
        lines.append(f"<p>Made {what}{facts['width']}x{facts['height']} in {report.result.seconds:.1f} s, seed "
                     f"{facts['seed']}: {html.escape(report.result.path)}</p>")  # fmt: skip
    else:
        percent = f"{100 * report.share:.0f}"
        lines.append(f'<div class="bar" role="progressbar" aria-valuemin="0" aria-valuemax="100" '
                     f'aria-valuenow="{percent}"><div style="width: {percent}%"></div></div>')  # fmt: skip
        lines.append(f"<p>{html.escape(report.text)} ({report.seconds:.0f} s)</p>")
    lines += [f'<p class="note">{html.escape(note)}</p>' for note in report.notes]
    return f'<div role="status">{"".join(lines)}</div>'
