"""The page of the studio: photo, learning, pictures and runs."""

import functools
import logging
import os
import re
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read when gradio is imported

import gradio as gr

from mifo.config.compose import written
from mifo.config.location import conf_folder
from mifo.data.instance_names import instances_in
from mifo.data.instances import InstanceSet, read_instances
from mifo.data.layouts import ARRANGEMENTS, LayoutSettings
from mifo.data.photo_folder import image_file
from mifo.data.pictures import read_picture
from mifo.data.settings import InstancesSettings
from mifo.errors import MifoError
from mifo.files import CONFIG
from mifo.report.palette import PALETTE, hexadecimal, text_colour
from mifo.studio import jobs, kept
from mifo.studio.clicks import Clicks
from mifo.tracking.index import read_facts

HERE = Path(__file__).parent
EMPTY: dict[str, Any] = {"picture": None, "names": []}
THEME = gr.themes.Base(
    primary_hue="blue",
    neutral_hue="zinc",
    radius_size="lg",
    font=["system-ui", "sans-serif"],
    font_mono=["ui-monospace", "monospace"],
)
STATES = {"running": "●", "ok": "✓", "failed": "✕", "interrupted": "❙❙", "died": "✕"}


def canvas(mode: str, *functions: Callable[..., Any]) -> gr.HTML:
    """Masks that are painted on a photo (`paint`), or boxes that are dragged on a square; see canvas.js.

    `functions` are those that it calls by their names.
    """
    return gr.HTML(
        EMPTY,
        html_template="<div class='studio-canvas'></div>",
        js_on_load=(HERE / "canvas.js").read_text(encoding="utf-8"),
        elem_id=mode,
        mode=mode,
        palette=[hexadecimal(each) for each in PALETTE],
        inks=[hexadecimal(text_colour(each)) for each in PALETTE],
        server_functions=list(functions),
    )


def told(function: Callable[..., Any]) -> Callable[..., Any]:
    """Show a refusal as a message in the browser."""

    @functools.wraps(function)
    def called(*values: Any) -> Any:
        try:
            return function(*values)
        except (MifoError, OSError) as error:
            raise gr.Error(str(error), duration=20, print_exception=False) from error

    return called


class ShownWarnings(logging.Handler):
    """Shows what is logged while the page is answered as a message in the browser."""

    def emit(self, record: logging.LogRecord) -> None:
        gr.Warning(re.sub(r"\S*\.unfinished/", "", record.getMessage()), duration=20)


class Studio:
    """What the page does; `folder` is where photos and layouts are kept, `segmenter` see `Clicks`."""

    def __init__(self, folder: Path, segmenter: str) -> None:
        self.folder, self.jobs, self.clicks = folder, jobs.Jobs(), Clicks(segmenter)

    def lists(self) -> tuple[gr.Dropdown, ...]:
        """What can be chosen when the page is opened: photos, twice, layouts and runs."""
        photos = kept.options(self.folder, "instances")
        layouts = kept.options(self.folder, "layout")
        return tuple(gr.Dropdown(each, value=None) for each in (photos, photos, layouts, jobs.runs()))

    def open_photo(self, file: str) -> tuple[Any, ...]:
        """Canvas, photo, name and a note for a photo that was dropped."""
        shown = kept.as_url(read_picture(Path(file)))
        note = "Name the first instance and paint over it or click on it; **+ instance** adds the next."
        return EMPTY | {"picture": shown}, file, Path(file).stem, note

    def open_folder(self, given: str) -> tuple[Any, ...]:
        """The same for a folder with a photo and masks."""
        folder = Path(given.strip()).expanduser()
        return self._opened(InstancesSettings(folder=str(folder)), folder.resolve().name)

    def open_kept(self, name: str) -> tuple[Any, ...]:
        """The same for what was kept."""
        return self._opened(kept.kept_instances(self.folder, name), name)

    def _opened(self, settings: InstancesSettings, name: str) -> tuple[Any, ...]:
        found = read_instances(settings)
        return kept.canvas_of(found), str(image_file(Path(settings.folder or ""))), name, f"Opened {name}."

    def click(self, given: dict[str, Any]) -> dict[str, str]:
        """The `mask` of what is clicked, or what is `told` instead: canvas.js calls it."""
        try:
            return {"mask": self.clicks.mask(given["picture"], given["points"])}
        except MifoError as error:
            return {"told": str(error)}

    def keep_photo(self, canvas: dict[str, Any], photo: str | None, name: str) -> tuple[Any, ...]:
        """A note and both lists of kept photos, with the new one chosen."""
        if photo is None:
            raise MifoError("there is no photo yet; drop one, or open a folder.")
        taken = kept.keep_photo(self.folder, name, Path(photo), canvas["names"], canvas["masks"])
        lists = gr.Dropdown(kept.options(self.folder, "instances"), value=taken)
        note = f"Kept as **{taken}**. On the command line: `instances={taken} --config-dir {self.folder}`"
        return note, lists, lists

    def learn(self, name: str, model: str, first: str, second: str, every: str) -> tuple[Any, ...]:
        """Start learning; the list of runs with the new one chosen."""
        kept.kept_instances(self.folder, name)
        given = [f"model={model}", f"instances={name}", "callbacks=[default,samples]"]
        given += [f"callbacks.samples.every={_whole(every)}", "trainer.log_every_n_steps=5"]
        given += ["+logger.csv.flush_logs_every_n_steps=1"]  # else a curve shows 100 values late
        for stage, steps in (("semantic", first), ("finetuning", second)):
            given += [f"learning.{stage}.steps={_whole(steps)}"] if steps else []
        folder = self.jobs.start("learn", [*given, "--config-dir", str(self.folder)])
        begun = (f"{name} · learn {folder.name[:19]}", str(folder))
        return gr.Dropdown([begun, *jobs.runs()], value=str(folder)), ""

    def stop(self, run: str | None) -> None:
        """Stop the run that is shown."""
        self.jobs.stop(Path(run or ""))

    def go_on(self, run: str | None) -> str:
        """Go on with the run that is shown."""
        self.jobs.resume(self._run(run))
        return ""

    def watch(self, run: str | None, seen: str) -> tuple[Any, ...]:
        """State, curves, pictures and log of a run; nothing where all are as they were `seen`."""
        if not run:
            return (gr.skip(),) * 5
        folder = Path(run)
        state, reason = self.jobs.state(folder)
        files = [*folder.glob("learning/samples/*.png"), *folder.glob("csv/*/metrics.csv"), folder / jobs.LOG]
        now = f"{run} {state} {[file.stat().st_mtime_ns for file in files if file.is_file()]}"
        if now == seen:
            return (gr.skip(),) * 5
        stand = f"{STATES.get(state, '○')} **{state}** `{run}` {reason}"
        return stand, jobs.curves(folder), jobs.pictures(folder), jobs.tail(folder), now

    def choose(self, run: str | None) -> tuple[Any, ...]:
        """Canvas with boxes in a row, and a prompt, for what was learned."""
        found = self._learned(run)
        names = kept.labels(found)
        boxes = [[round(edge, 3) for edge in box] for box in ARRANGEMENTS["row"](found.tokens).values()]
        prompt = f"a photo of {' and '.join(names)} at the beach"
        return {"names": names, "fixed": len(names), "boxes": boxes}, prompt

    def open_layout(self, name: str, run: str | None) -> tuple[Any, ...]:
        """Canvas and prompt of a layout that was kept."""
        found = self._learned(run)
        layout = kept.kept_layout(self.folder, name, found.tokens)
        names = kept.labels(found)
        others = [key for key in layout.boxes if key not in found.tokens]
        boxes = [layout.boxes.get(key) for key in (*found.tokens, *others)]
        canvas = {"names": [*names, *others], "fixed": len(names), "boxes": boxes}
        return canvas, kept.with_labels(layout.prompt, names)

    def keep_layout(self, canvas: dict[str, Any], prompt: str, name: str, run: str | None) -> tuple[Any, ...]:
        """A note and the list of layouts, with the new one chosen."""
        found = self._learned(run)
        keys = [*found.tokens, *(each.strip() for each in canvas["names"][len(found.tokens) :])]
        boxes = {key: box for key, box in zip(keys, canvas["boxes"], strict=True) if box}
        layout = LayoutSettings(kept.with_tokens(prompt, kept.labels(found)), boxes=boxes)
        taken = kept.keep_layout(self.folder, name or found.name, layout, found.tokens)
        note = f"Kept as **{taken}**: `{layout.prompt}`"
        return note, gr.Dropdown(kept.options(self.folder, "layout"), value=taken), taken

    def make(self, run: str | None, layout: str, number: str, seed: str, steps: str) -> tuple[str, str]:
        """Start to make pictures of a layout that was just kept; their folder."""
        facts = read_facts(self._run(run))
        given = [f"learned={written(run)}", f"model={facts['choices.model']}", f"layout={layout}"]
        given += [f"synthesis.samples={_whole(number)}", f"seed={_whole(seed)}"]
        if facts["choices.model"] == "local":
            given.append(f"model.source={written(facts['model.source'])}")
        given += [f"synthesis.steps={_whole(steps)}"] if steps else []
        return str(self.jobs.start("synthesize", [*given, "--config-dir", str(self.folder)])), ""

    def show(self, selected: gr.SelectData) -> tuple[Any, ...]:
        """State and pictures of the run in the row that was clicked."""
        return self.watch(str(self._run(selected.row_value[0])), "")[:3:2]

    def _run(self, run: str | None) -> Path:
        if not run or run not in (folder for _, folder in jobs.runs()):  # it may come from anywhere
            raise MifoError("no run is chosen; choose one of the list.")
        return Path(run)

    def _learned(self, run: str | None) -> InstanceSet:
        return read_instances(instances_in(self._run(run) / "learned" / CONFIG, "instances"))


def build(studio: Studio) -> gr.Blocks:
    """The page, whose parts call the methods of `studio`."""
    models = sorted(file.stem for file in (conf_folder() / "model").glob("*.yaml") if file.stem != "local")

    def click(given: dict[str, Any]) -> dict[str, str]:  # gradio takes no method here
        return studio.click(given)

    with gr.Blocks(title="MIFO studio") as page:
        gr.HTML("<h1>MIFO <span>studio</span></h1>", elem_id="title")
        with gr.Tab("1 · Photo"), gr.Row():
            with gr.Column(scale=3):
                painted = canvas("paint", click)
            with gr.Column(scale=1, min_width=300):
                dropped = gr.File(label="Drop a photo", file_types=["image"], height=130, elem_id="drop")
                given = gr.Textbox(label="or a folder of photo and masks", placeholder="my_photo, then Enter")
                again = gr.Dropdown(label="or what was kept")
                called = gr.Textbox(label="name of this photo")
                keep = gr.Button("Keep photo and masks", variant="primary")
                note = gr.Markdown()
        with gr.Tab("2 · Learn"), gr.Row():
            with gr.Column(scale=1, min_width=330):
                learnt = gr.Dropdown(label="photo")
                model = gr.Dropdown(models, value="miniature", label="model")
                with gr.Row():
                    first = gr.Textbox(label="steps, words", placeholder="usual", min_width=100)
                    second = gr.Textbox(label="steps, weights", placeholder="usual", min_width=100)
                every = gr.Textbox("100", label="steps between sample pictures")
                start = gr.Button("Learn", variant="primary")
                with gr.Row():
                    stop, go_on = gr.Button("Stop", min_width=100), gr.Button("Go on", min_width=100)
                watched = gr.Dropdown(label="run that is shown")
            with gr.Column(scale=3):
                state = gr.Markdown("Choose a photo and press **Learn**.", elem_id="state")
                curves = gr.HTML()
                samples = gr.Gallery(show_label=False, columns=3, height=330, object_fit="contain")
                with gr.Accordion("What the command says", open=False):
                    log = gr.Textbox(show_label=False, lines=8, max_lines=20)
        with gr.Tab("3 · Pictures") as placing:
            with gr.Row():
                with gr.Column(scale=1):
                    boxed = canvas("boxes")
                with gr.Column(scale=1):
                    run = gr.Dropdown(label="what was learned", elem_id="run")
                    layout = gr.Dropdown(label="layout that was kept", elem_id="layout")
                    prompt = gr.Textbox(label="prompt, with the names of the instances", lines=2)
                    with gr.Row():
                        number = gr.Textbox("4", label="pictures", min_width=80)
                        seed = gr.Textbox("0", label="seed", min_width=80)
                        steps = gr.Textbox(label="sampling steps", placeholder="usual", min_width=80)
                    placed = gr.Textbox(label="name of the layout", placeholder="that of the photo")
                    with gr.Row():
                        keep_layout = gr.Button("Keep layout", min_width=100)
                        make = gr.Button("Make pictures", variant="primary", min_width=100)
                    kept_note, made_note = gr.Markdown(), gr.Markdown(elem_id="made-note")
            made = gr.Gallery(show_label=False, columns=4, height=360, object_fit="contain", elem_id="made")
        with gr.Tab("4 · Runs") as past:
            listed = gr.Dataframe(interactive=False, elem_id="runs")
            chosen = gr.Markdown("Click a run to see what it made.")
            shown = gr.Gallery(show_label=False, columns=3, height=420, object_fit="contain", elem_id="shown")

        photo, seen, making, seen_made, name = (gr.State(None) for _ in range(5))
        quiet = {"show_progress": "hidden"}  # which would also cover with "Error" what a refusal concerns
        opened = [painted, photo, called, note]
        dropped.upload(told(studio.open_photo), dropped, opened, **quiet)
        given.submit(told(studio.open_folder), given, opened, **quiet)
        # a list tells of its input a second time, which would take back what was done since; not of a choice
        again.select(told(studio.open_kept), again, opened, **quiet)
        keep.click(told(studio.keep_photo), [painted, photo, called], [note, again, learnt], **quiet)
        start.click(told(studio.learn), [learnt, model, first, second, every], [watched, seen], **quiet)
        stop.click(told(studio.stop), watched, **quiet)
        go_on.click(told(studio.go_on), watched, seen, **quiet)
        for tab in (page.load, placing.select):
            tab(lambda: gr.Dropdown(jobs.runs(True)), None, run, **quiet)
        page.load(studio.lists, None, [again, learnt, layout, watched], **quiet)
        run.select(told(studio.choose), run, [boxed, prompt], **quiet)
        layout.select(told(studio.open_layout), [layout, run], [boxed, prompt], **quiet)
        keeping = ([boxed, prompt, placed, run], [kept_note, layout, name])
        keep_layout.click(told(studio.keep_layout), *keeping, **quiet)
        make.click(told(studio.keep_layout), *keeping, **quiet).success(
            told(studio.make), [run, name, number, seed, steps], [making, seen_made], **quiet
        )
        past.select(jobs.table, None, listed, **quiet)
        listed.select(told(studio.show), None, [chosen, shown], **quiet)
        clock, made_parts = gr.Timer(2), [made_note, made, seen_made]
        clock.tick(studio.watch, [watched, seen], [state, curves, samples, log, seen], **quiet)
        clock.tick(lambda *given: studio.watch(*given)[::2], [making, seen_made], made_parts, **quiet)
    return page


def serve(studio: Studio, host: str, port: int, browser: bool) -> None:
    """Serve the page until the process is asked to end; what learns then is stopped, and can go on later."""
    logging.getLogger("httpx").setLevel(logging.WARNING)  # with which gradio calls its own server
    logging.getLogger("mifo.data").addHandler(ShownWarnings(logging.WARNING))  # of pictures and masks
    page = build(studio)
    try:
        page.launch(
            server_name=host,
            server_port=port,
            inbrowser=browser,
            prevent_thread_lock=True,
            quiet=True,
            share=False,
            ssr_mode=False,
            footer_links=[],
            max_file_size="512mb",
            theme=THEME,
            css_paths=HERE / "studio.css",
        )
        print(f"studio: {page.local_url}  (Ctrl-C ends it; what is kept lies in {studio.folder})", flush=True)
        threading.Event().wait()
    except KeyboardInterrupt:
        print("studio: ended")
    finally:
        studio.jobs.stop_all()
        page.close()


def _whole(text: str) -> int:
    if not re.fullmatch(r"\d{1,7}", text.strip()):
        raise MifoError(f"'{text}' is no whole number; write one such as 4.")
    return int(text)
