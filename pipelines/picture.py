"""Pictures in and out: guarded opening, and PNGs that carry the settings they were made with. Torch-free.

A written PNG has two text chunks: `parameters`, the lines other studios read, and `intarsia`, one JSON object with the
whole request, the adapters' hashes and the package versions. There is no time in it: same request, same bytes.
"""

from __future__ import annotations

import base64
import io
import json
import warnings
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, cast

from PIL import Image, ImageCms, ImageOps, PngImagePlugin, UnidentifiedImageError

from . import a1111
from .a1111 import Restored
from .atomic import replacing
from .errors import InputError
from .requests import GenerateRequest

__all__ = ["Restored", "open_picture", "read_settings", "versions", "write_png"]

MAX_PIXELS = 64_000_000
MAX_BYTES = 2**29  # of a file
CHUNK = "intarsia"
FORMAT_VERSION = 1
PACKAGES = ("intarsia", "torch", "diffusers", "transformers")
# Pixels alone: Pillow knows others too, and hands an EPS, whatever its name, to Ghostscript.
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "PPM", "AVIF")
WAY_OUT = "Use a PNG, JPEG or WebP picture."


def open_picture(source: Path | str | bytes, limit: int = MAX_PIXELS) -> Image.Image:
    """Open a picture as 8-bit RGB, upright, transparency laid on white.

    Args:
        source: A file, or the bytes of one.
        limit: Most pixels allowed; checked before anything is decoded.

    Raises:
        InputError: It is missing, empty, cut off, no picture, too large, or an animation.
    """
    name = "The picture" if isinstance(source, bytes) else Path(source).name
    raw = _read(source, name)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # the limit below is stricter
            Image.init()
            picture = Image.open(io.BytesIO(raw), formats=[name for name in FORMATS if name in Image.OPEN])
    except UnidentifiedImageError:
        raise InputError(f"{name} is not a picture that can be read.", WAY_OUT) from None
    except Image.DecompressionBombError:
        raise InputError(f"{name} has more than {limit:,} pixels.", "Make it smaller first.") from None
    except (OSError, ValueError, SyntaxError) as error:
        raise InputError(f"{name} is damaged: {error}.", "Save or download it again.") from None
    if picture.width * picture.height > limit:
        raise InputError(
            f"{name} has {picture.width} x {picture.height} pixels; at most {limit:,} are read.",
            "Make it smaller first.",
        )
    if getattr(picture, "is_animated", False) and picture.format != "MPO":  # phones keep a second view in a JPEG
        raise InputError(
            f"{name} is an animation of {getattr(picture, 'n_frames', 2)} frames.", "Save the frame you want as a PNG."
        )
    try:
        picture.load()
        return _plain(picture, name)
    except (OSError, ValueError, SyntaxError, EOFError) as error:
        raise InputError(f"{name} is cut off or damaged: {error}.", "Save or download it again.") from None


def _read(source: Path | str | bytes, name: str) -> bytes:
    if isinstance(source, bytes):
        raw = source
    else:
        path = Path(source)
        if path.is_dir():
            raise InputError(f"{path} is a folder, not a picture.", WAY_OUT)
        try:
            if path.stat().st_size > MAX_BYTES:
                raise InputError(f"{name} has {path.stat().st_size:,} bytes; at most {MAX_BYTES:,} are read.", WAY_OUT)
            raw = path.read_bytes()
        except FileNotFoundError:
            raise InputError(f"There is no picture {path}.", "Check the path.") from None
        except OSError as error:
            raise InputError(f"{path} cannot be read: {error.strerror or error}.", "Check its permissions.") from None
    if not raw:
        raise InputError(f"{name} is empty.", "Save or download it again.")
    return raw


def _plain(picture: Image.Image, name: str) -> Image.Image:
    """Turn any mode into upright 8-bit RGB."""
    picture = ImageOps.exif_transpose(picture)
    if picture.mode == "F":
        raise InputError(f"{name} holds floating point numbers, whose white is unknown.", "Save it as an 8-bit PNG.")
    if picture.mode.startswith("I"):  # 16 bits a pixel, whatever the byte order
        picture = picture.convert("I").point(lambda value: value * (1 / 257) + 0.5).convert("L")
    if picture.mode == "CMYK":
        return _from_cmyk(picture)
    if picture.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in picture.info:
        picture = picture.convert("RGBA")
        ground = Image.new("RGBA", picture.size, "white")
        return Image.alpha_composite(ground, picture).convert("RGB")
    return picture.convert("RGB")


def _from_cmyk(picture: Image.Image) -> Image.Image:
    """Convert by the picture's own colour profile where it has one."""
    profile: Any = picture.info.get("icc_profile")
    if profile:
        try:
            made = ImageCms.profileToProfile(
                picture, ImageCms.ImageCmsProfile(io.BytesIO(profile)), ImageCms.createProfile("sRGB"), outputMode="RGB"
            )
        except ImageCms.PyCMSError:
            made = None  # a broken profile is as good as none
        if made is not None:
            return made
    return picture.convert("RGB")


def write_png(image: Image.Image, path: Path, request: GenerateRequest, extra: Mapping[str, Any] | None = None) -> Path:
    """Write a picture with the settings that made it, under a temporary name first.

    Args:
        image: RGB.
        path: Where to.
        request: Of this one picture: its own seed, its adapters with their SHA-256.
        extra: More entries for the JSON chunk, such as the width and height that were used.
    """
    more = dict(extra or {})
    chunk = {"version": FORMAT_VERSION, "request": request.model_dump(mode="json"), "packages": versions()} | more
    size = (image.width, image.height)
    info = PngImagePlugin.PngInfo()
    text = a1111.write(request, size)
    (info.add_text if _latin(text) else info.add_itxt)("parameters", text)
    info.add_text(CHUNK, json.dumps(chunk, sort_keys=True))  # ASCII: other letters are escaped
    with replacing(path) as temporary:
        image.save(temporary, "PNG", pnginfo=info)
    return path


def data_url(path: Path, side: int = 256) -> str:
    """A small copy of a picture as text, as adapter files carry it (ModelSpec 1.0.1, `thumbnail`)."""
    picture = open_picture(path)
    picture.thumbnail((side, side))
    buffer = io.BytesIO()
    picture.convert("RGB").save(buffer, format="WEBP", quality=85)
    return "data:image/webp;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")


def _latin(text: str) -> bool:
    """Whether a text fits PNG's plain text chunk; others go into an international one, which few tools miss."""
    try:
        text.encode("latin-1")
    except UnicodeEncodeError:
        return False
    return True


def versions() -> dict[str, str]:
    """Versions of the packages that shape a picture."""
    found: dict[str, str] = {}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def read_settings(path: Path) -> Restored:
    """Read the settings a picture was made with: ours, or the text of A1111 and its relatives.

    Raises:
        InputError: It is no picture, or carries no settings that can be read.
    """
    open_picture(path)  # says what is wrong with a broken file
    with Image.open(path) as picture:
        picture.load()
        texts: dict[Any, Any] = dict(picture.info)
        comment: Any = picture.getexif().get_ifd(0x8769).get(0x9286)  # EXIF UserComment, in JPEG and WebP
    if isinstance(texts.get(CHUNK), str):
        return _ours(path.name, texts[CHUNK])
    text = texts.get("parameters") or _user_comment(comment)
    if isinstance(text, str) and text.strip():
        return a1111.read(text)
    if "prompt" in texts and "workflow" in texts:
        raise InputError(f"{path.name} carries a ComfyUI workflow, which cannot be restored.", "Type its prompt here.")
    raise InputError(f"{path.name} carries no settings.", "Only pictures that were saved with their settings do.")


def _ours(name: str, text: str) -> Restored:
    try:
        chunk: object = json.loads(text)
    except ValueError:
        raise InputError(f"The settings in {name} are damaged.", "Use the original file.") from None
    found = cast(dict[str, Any], chunk) if isinstance(chunk, dict) else {}
    values: object = found.get("request")
    if not isinstance(values, dict):
        raise InputError(f"The settings in {name} are damaged.", "Use the original file.")
    table = cast(dict[str, Any], values)
    notes: list[str] = []
    if found.get("version") != FORMAT_VERSION:
        unknown = [key for key in table if key not in GenerateRequest.model_fields]
        notes.append(f"The picture is of another version of Intarsia; not restored: {', '.join(unknown) or 'nothing'}.")
        table = {key: value for key, value in table.items() if key not in unknown}
    made_with: dict[str, str] = found.get("packages") or {}
    changed = [f"{key} {value}" for key, value in made_with.items() if versions().get(key) != value]
    if changed:
        notes.append(f"It was made with {', '.join(changed)}; the picture may come out slightly different.")
    composed = found.get("composition")
    layout = cast(dict[str, Any], composed) if isinstance(composed, dict) else None
    return Restored(GenerateRequest.parse(table), tuple(notes), layout)


def _user_comment(comment: object) -> str | None:
    """Decode EXIF's UserComment: eight bytes name the code, the text follows."""
    if not isinstance(comment, bytes):
        return comment if isinstance(comment, str) else None
    code, body = comment[:8], comment[8:]
    if code == b"UNICODE\0":
        return body.decode("utf-16-be" if body[:1] == b"\0" else "utf-16-le", errors="replace")
    return (body if code in (b"ASCII\0\0\0", b"\0" * 8) else comment).decode("utf-8", errors="replace")
