"""How the page looks: the theme's colours, and the style and script files in `assets/`."""

from __future__ import annotations

from importlib.resources import files

from gradio import themes
from gradio.themes.utils import sizes
from gradio.themes.utils.colors import Color

# Warm paper and dark wood with one accent, as in the craft the studio is named after.
WOOD = Color(
    c50="#fbf3ee", c100="#f6e2d7", c200="#ecc5b0", c300="#e3a688", c400="#e08a5f", c500="#c96a3d",
    c600="#b1542b", c700="#8f4222", c800="#70351d", c900="#592c1a", c950="#30160c", name="wood",
)  # fmt: skip
PAPER = Color(
    c50="#faf9f6", c100="#f4f1ec", c200="#e8e3db", c300="#d6cfc4", c400="#a79e91", c500="#7c7468",
    c600="#5f584e", c700="#3a3631", c800="#262320", c900="#1c1a18", c950="#131211", name="paper",
)  # fmt: skip
SANS = ("system-ui", "-apple-system", "Segoe UI", "Roboto", "Noto Sans", "DejaVu Sans", "sans-serif")
SCRIPTS = ("studio.js", "rack.js", "library.js", "compose.js", "compose_cards.js")  # in this order
STYLES = ("studio.css", "compose.css")
MONO = ("ui-monospace", "SF Mono", "Menlo", "Consolas", "DejaVu Sans Mono", "monospace")


def text(name: str) -> str:
    """Read a text file of `assets/`."""
    return (files("intarsia.assets") / name).read_text(encoding="utf-8")


def styles() -> str:
    """Give the page's style sheets."""
    return "".join(text(name) for name in STYLES)


def head() -> str:
    """Give what goes into the page's head: the scripts the own components use."""
    scripts = "".join(f"<script>{text(name)}</script>" for name in SCRIPTS)
    return f'<meta name="color-scheme" content="light dark">{scripts}'


def theme() -> themes.Base:
    """Make the theme. System fonts only: the page must not wait for a network."""
    base = themes.Base(
        primary_hue=WOOD,
        secondary_hue=WOOD,
        neutral_hue=PAPER,
        radius_size=sizes.radius_md,
        spacing_size=sizes.spacing_md,
        text_size=sizes.text_md,
        font=SANS,
        font_mono=MONO,
    )
    return base.set(
        body_background_fill="*neutral_100",
        body_background_fill_dark="*neutral_950",
        body_text_color="#221f1b",
        body_text_color_dark="#ece8e2",
        body_text_color_subdued="*neutral_500",
        body_text_color_subdued_dark="*neutral_400",
        background_fill_primary="#fffefc",
        background_fill_primary_dark="*neutral_900",
        background_fill_secondary="*neutral_100",
        background_fill_secondary_dark="*neutral_800",
        border_color_primary="*neutral_200",
        border_color_primary_dark="*neutral_700",
        block_background_fill="transparent",
        block_background_fill_dark="transparent",
        block_border_width="0px",
        block_shadow="none",
        block_padding="0",
        block_label_background_fill="transparent",
        block_label_background_fill_dark="transparent",
        block_title_text_size="*text_sm",
        block_title_text_weight="500",
        block_title_text_color="*neutral_600",
        block_title_text_color_dark="*neutral_400",
        input_background_fill="#fffefc",
        input_background_fill_dark="*neutral_900",
        input_background_fill_focus="#fffefc",
        input_background_fill_focus_dark="*neutral_900",
        input_border_color="*neutral_300",
        input_border_color_dark="*neutral_700",
        input_border_color_focus="*primary_500",
        input_border_color_focus_dark="*primary_400",
        input_border_width="1px",
        input_shadow="none",
        input_shadow_focus="none",
        input_radius="*radius_md",
        button_primary_background_fill="*primary_600",
        button_primary_background_fill_dark="*primary_500",
        button_primary_background_fill_hover="*primary_700",
        button_primary_background_fill_hover_dark="*primary_400",
        button_primary_text_color="#fffaf6",
        button_primary_text_color_dark="#1b0e06",
        button_secondary_background_fill="*neutral_200",
        button_secondary_background_fill_dark="*neutral_800",
        button_secondary_background_fill_hover="*neutral_300",
        button_secondary_background_fill_hover_dark="*neutral_700",
        button_border_width="0px",
        button_large_radius="*radius_md",
        slider_color="*primary_500",
        slider_color_dark="*primary_400",
        layout_gap="14px",
        form_gap_width="0px",
        block_radius="*radius_md",
    )
