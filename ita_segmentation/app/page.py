"""The page itself: Gradio Blocks around a `GradioSegmenter`.

The two parts that Gradio has no component for, the tags of class names and the view of the result, are `gr.HTML` with
a template and a script each, in `web/`. They are fed with data only, so no name that somebody types is ever read as
HTML; hover, click, opacity and downloads need no further request.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gradio as gr

from ita_segmentation.app.segmenter import ClassExample, GradioSegmenter
from ita_segmentation.prediction.segmenter import DEFAULT_THRESHOLDS

WEB = Path(__file__).parent / "web"
CLEANING_SECONDS, UPLOADS_KEPT_SECONDS = 600, 3000
"""Uploads are looked for every ten minutes and are gone within the hour."""
TASK_CHOICES = [("Semantic", "semantic"), ("Panoptic", "panoptic"), ("Instance", "instance")]
TASK_HELP = "Classes of pixels; things one by one, and stuff; or things alone."
TILES_HELP = (
    "Side in pixels; each tile goes through the network by itself, so small objects are found. 0: one image."
)
EXAMPLE_HELP = "Which of the class names it shows. The example joins the name."
BOX_HELP = "Left, top, right, bottom in pixels of that image. Empty: all of it."
HEAD = """\
<div class="ita-head"><h1>Segment anything you can name</h1>
<p>Drop an image, name the classes to look for, and see where they are. Uploads are deleted within the hour.</p>
</div>"""
MARK_OUTDATED = """() => {
  window.itaInputs = (window.itaInputs || 0) + 1;
  window.dispatchEvent(new Event('ita-inputs'));
}"""
MARK_ASKED = "(...inputs) => { window.itaAsked = window.itaInputs || 0; return inputs; }"


@dataclass(frozen=True)
class Example:
    """An image that is offered."""

    path: Path
    classes: str = ""

    @property
    def class_list(self) -> list[str]:
        """The classes one by one."""
        return [name.strip() for name in self.classes.split(",") if name.strip()]


@dataclass
class Upload:
    """An uploaded image that nothing has looked at yet."""

    path: str
    name: str


def build_page(
    segmenter: GradioSegmenter, examples: Sequence[Example], concurrency: int, max_waiting: int
) -> gr.Blocks:
    """Build the page, not launched yet."""
    with gr.Blocks(
        title="ITA: segment anything you can name",
        analytics_enabled=False,
        delete_cache=(CLEANING_SECONDS, UPLOADS_KEPT_SECONDS),
    ) as page:
        gr.HTML(HEAD)
        with gr.Row(equal_height=False):
            with gr.Column(scale=4, min_width=320):
                image = _image_input()
                if examples:
                    row = _example_row(examples)
                names = _names_input(segmenter)
                task = gr.Radio(
                    TASK_CHOICES, value="semantic", label="Task", info=TASK_HELP, elem_id="ita-task"
                )
                threshold = gr.Slider(
                    0,
                    1,
                    step=0.01,
                    value=DEFAULT_THRESHOLDS["semantic"],
                    label="Minimum score of a segment",
                    elem_id="ita-threshold",
                )
                run = gr.Button("Segment", variant="primary", size="lg", elem_id="ita-run")
                tiles = gr.Number(
                    value=0,
                    precision=0,
                    minimum=0,
                    label="Tiles for large images",
                    info=TILES_HELP,
                    elem_id="ita-tiles",
                )
                with gr.Accordion("A class by example", open=False, elem_id="ita-by-example"):
                    shown = _image_input("Image that shows the class", "ita-example")
                    shown_class = gr.Textbox(label="Class", info=EXAMPLE_HELP, elem_id="ita-example-class")
                    shown_box = gr.Textbox(label="Box", info=BOX_HELP, elem_id="ita-example-box")
            with gr.Column(scale=6, min_width=320):
                result = _result_view()
        if examples:
            row.click(
                lambda place: (str(examples[place].path), examples[place].class_list),
                row,
                [image, names],
                queue=False,
                show_progress="hidden",
                api_visibility="private",
            )
        task.change(
            lambda chosen: DEFAULT_THRESHOLDS[chosen],
            task,
            threshold,
            queue=False,
            show_progress="hidden",
            api_visibility="private",
        )
        for one in (image, names, task, threshold, tiles, shown, shown_class, shown_box):
            one.change(None, js=MARK_OUTDATED, queue=False, api_visibility="private")

        def segment(
            image: Upload | None,
            names: Any,
            task: Any,
            threshold: Any,
            tiles: Any = 0,
            example: Upload | None = None,
            example_class: Any = None,
            example_box: Any = None,
        ) -> Iterator[Any]:
            path, name = (image.path, image.name) if image else (None, None)
            given = ClassExample(example.path, example.name, example_class, example_box) if example else None
            # Between two steps Gradio looks whether the user is still there.
            for step in segmenter.answer(path, names, task, threshold, name, tiles, given):
                yield gr.skip() if step is None else step

        run.click(
            segment,
            [image, names, task, threshold, tiles, shown, shown_class, shown_box],
            result,
            js=MARK_ASKED,
            api_name="segment",
            concurrency_limit=concurrency,
            show_progress_on=[result],
        )
    page.queue(max_size=max_waiting)
    return page


def _image_input(label: str = "Image", elem_id: str = "ita-upload") -> gr.Image:
    """An upload that is handed on unread: limits come before decoding, and errors are sentences."""
    image = gr.Image(
        label=label,
        type="filepath",
        image_mode=None,
        sources=["upload", "clipboard"],
        buttons=[],
        height=170,
        elem_id=elem_id,
        alt_text="The image to segment",
        placeholder="Drop an image here, or click to choose one",
    )

    def unread(payload: Any) -> Upload | None:
        if payload is None or payload.path is None:
            return None
        return Upload(payload.path, Path(payload.orig_name or payload.path).name)

    image.preprocess = unread  # type: ignore[method-assign, assignment]
    return image


def _example_row(examples: Sequence[Example]) -> gr.Dataset:
    """Thumbnails to choose from.

    `gr.Examples` would answer the click with a new `gr.Image` in the place of the upload, which opens files itself.
    """
    return gr.Dataset(
        components=[gr.Image(render=False)],
        samples=[[str(example.path)] for example in examples],
        type="index",
        label="Examples",
        elem_id="ita-examples",
    )


def _names_input(segmenter: GradioSegmenter) -> gr.HTML:
    own = segmenter.model.default_vocabulary or []
    limits = segmenter.limits.names
    return gr.HTML(
        value=[],  # type: ignore[arg-type]
        html_template=_web_file("names.html"),
        js_on_load=_web_file("names.js"),
        apply_default_css=False,
        elem_id="ita-names",
        own_names=[names[0] for names in own],
        max_names=limits.names,
        max_characters=limits.characters,
    )


def _result_view() -> gr.HTML:
    return gr.HTML(
        html_template=_web_file("viewer.html"),
        js_on_load=_web_file("viewer.js"),
        apply_default_css=False,
        elem_id="ita-result",
    )


def _web_file(name: str) -> str:
    return (WEB / name).read_text(encoding="utf-8")


def page_style() -> dict[str, Any]:
    """Return what `Blocks.launch` takes for the look: fonts of the system, so that nothing is fetched."""
    theme = gr.themes.Soft(
        primary_hue=gr.themes.colors.teal,
        secondary_hue=gr.themes.colors.teal,
        neutral_hue=gr.themes.colors.slate,
        font=["system-ui", "-apple-system", "Segoe UI", "Roboto", "sans-serif"],
        font_mono=["ui-monospace", "Menlo", "Consolas", "monospace"],
    ).set(
        body_text_color_subdued="*neutral_600",
        body_text_color_subdued_dark="*neutral_400",
        block_border_width="1px",
        block_label_background_fill="*block_background_fill",
        block_label_background_fill_dark="*block_background_fill",
        block_label_text_color="*body_text_color",
        block_title_background_fill="none",
        block_title_padding="0",
        block_title_text_color="*body_text_color",
        button_primary_background_fill="*primary_700",
        button_primary_background_fill_dark="*primary_700",
        button_primary_background_fill_hover="*primary_800",
        button_primary_background_fill_hover_dark="*primary_800",
        checkbox_label_background_fill_selected="*primary_700",
        checkbox_label_background_fill_selected_dark="*primary_700",
        input_border_color="*neutral_300",
        input_border_color_dark="*neutral_600",
        input_placeholder_color="*neutral_500",
        input_placeholder_color_dark="*neutral_300",
        link_text_color="*primary_700",
        link_text_color_dark="*primary_300",
        slider_color="*primary_600",
    )
    return {"theme": theme, "css": _web_file("page.css"), "footer_links": ["api", "settings"]}
