"""The page itself: Gradio Blocks around a `PageSegmenter`.

The two parts that Gradio has no component for, the chips of class words and the view of the result, are `gr.HTML`
with a template and a script each, in `web/`. They are fed with data only, so no word that somebody types is ever read
as HTML; hover, click, opacity and downloads need no further request.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gradio as gr

from ita_segmentation.app.class_names import MAX_NAME_CHARACTERS
from ita_segmentation.app.segmenter import PageSegmenter
from ita_segmentation.images import IMAGE_SUFFIXES
from ita_segmentation.prediction.segmenter import DEFAULT_THRESHOLDS

WEB = Path(__file__).parent / "web"
MAX_EXAMPLES = 8
CLEANING_SECONDS, UPLOADS_KEPT_SECONDS = 600, 3000  # looked for every ten minutes; gone within the hour
TASK_CHOICES = [("Semantic", "semantic"), ("Panoptic", "panoptic"), ("Instance", "instance")]
TASK_HELP = (
    "Semantic: a class for every pixel. Panoptic: things one by one, and stuff. Instance: things alone."
)
HEAD = """\
<div class="ita-head"><h1>Segment anything you can name</h1>
<p>Drop an image, type the classes to look for, and see where they are. Nothing you upload is kept for longer than an
hour.</p></div>"""


@dataclass
class Upload:
    """An uploaded image that nothing has looked at yet: its file here and its name there."""

    path: str
    name: str


def example_images(checkpoint: Path, shipped: Path) -> list[Path]:
    """Images of the checkpoint's own `examples` folder, or else of the folder `shipped`, in the order of names."""
    for folder in (checkpoint / "examples", shipped):
        found = sorted(folder.glob("*")) if folder.is_dir() else []
        found = [path for path in found if path.suffix.lower() in IMAGE_SUFFIXES]
        if found:
            return found[:MAX_EXAMPLES]
    return []


def build_page(
    segmenter: PageSegmenter, examples: Sequence[Path], concurrency: int, max_waiting: int
) -> gr.Blocks:
    """The page, not launched yet.

    Args:
        segmenter: what answers.
        examples: images offered.
        concurrency: requests worked on at the same time.
        max_waiting: requests that may wait; more are told to come back.
    """
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
                    _example_row(examples, image)
                words = _words_input(segmenter)
                task = gr.Radio(TASK_CHOICES, value="semantic", label="Task", info=TASK_HELP)
                threshold = gr.Slider(
                    0,
                    1,
                    step=0.01,
                    label="Least score of a segment",
                    info="Segments that are less sure are left out.",
                    elem_id="ita-threshold",
                    **_threshold_of("semantic"),
                )
                run = gr.Button("Segment", variant="primary", size="lg", elem_id="ita-run")
            with gr.Column(scale=6, min_width=320):
                result = _result_view()
        task.change(
            lambda chosen: gr.Slider(**_threshold_of(chosen)),
            task,
            threshold,
            queue=False,
            show_progress="hidden",
            api_visibility="private",
        )

        def segment(image: Upload | None, words: Any, task: Any, threshold: Any) -> dict[str, Any]:
            path, name = (image.path, image.name) if image else (None, None)
            return segmenter.answer(path, words, task, threshold, name)

        run.click(
            segment,
            [image, words, task, threshold],
            result,
            api_name="segment",
            concurrency_limit=concurrency,
            show_progress_on=[result],
        )
    page.queue(max_size=max_waiting)
    return page


def _image_input() -> gr.Image:
    """An upload that is handed on unread: limits come before decoding, and errors in words."""
    image = gr.Image(
        label="Image",
        type="filepath",
        image_mode=None,
        sources=["upload", "clipboard"],
        buttons=[],
        height=260,
        elem_id="ita-upload",
        alt_text="The image to segment",
        placeholder="Drop an image here\n- or -\nclick to choose one",
    )

    def unread(payload: Any) -> Upload | None:
        if payload is None or payload.path is None:
            return None
        return Upload(payload.path, Path(payload.orig_name or payload.path).name)

    image.preprocess = unread  # type: ignore[method-assign, assignment]
    return image


def _example_row(examples: Sequence[Path], image: gr.Image) -> None:
    """Thumbnails; a click on one makes it the image.

    `gr.Examples` would answer the click with a new `gr.Image` in the place of `image`, which opens uploads itself.
    """
    row = gr.Dataset(
        components=[gr.Image(render=False)],
        samples=[[str(path)] for path in examples],
        type="index",
        label="Example images",
        elem_id="ita-examples",
    )
    row.click(
        lambda place: str(examples[place]),
        row,
        image,
        queue=False,
        show_progress="hidden",
        api_visibility="private",
    )


def _words_input(segmenter: PageSegmenter) -> gr.HTML:
    own = segmenter.model.default_vocabulary or []
    return gr.HTML(
        value=[],  # type: ignore[arg-type]
        html_template=_web_file("words.html"),
        js_on_load=_web_file("words.js"),
        apply_default_css=False,
        elem_id="ita-words",
        own_words=[names[0] for names in own],
        max_classes=segmenter.limits.max_classes,
        max_characters=MAX_NAME_CHARACTERS,
    )


def _result_view() -> gr.HTML:
    return gr.HTML(
        html_template=_web_file("viewer.html"),
        js_on_load=_web_file("viewer.js"),
        apply_default_css=False,
        elem_id="ita-result",
    )


def _threshold_of(task: str) -> dict[str, Any]:
    """The slider's settings for a task; semantic segmentation gives every pixel its best class, without a limit."""
    return {"value": DEFAULT_THRESHOLDS.get(task, 0.0), "visible": task != "semantic"}


def _web_file(name: str) -> str:
    return (WEB / name).read_text(encoding="utf-8")


def page_style() -> dict[str, Any]:
    """What `Blocks.launch` takes for the look: fonts of the system, so that nothing is fetched."""
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
        button_primary_background_fill_hover_dark="*primary_600",
        checkbox_label_background_fill_selected="*primary_700",
        checkbox_label_background_fill_selected_dark="*primary_700",
        input_border_color="*neutral_300",
        input_border_color_dark="*neutral_600",
        input_placeholder_color="*neutral_500",
        slider_color="*primary_600",
    )
    return {"theme": theme, "css": _web_file("page.css"), "footer_links": ["api", "settings"]}
