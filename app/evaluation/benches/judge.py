"""The judge's own error, on pictures its training never saw; and whether two instruments nobody here trained agree."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

from ....pipelines.events import Event, Notice, Stage
from ....pipelines.options import option
from .. import instruments
from ..base_report import share
from ..bench import Place, Summary, Table
from ..options import EvaluationOptions
from ..statistics import mean_spread, rank_correlation, shown

if TYPE_CHECKING:
    from PIL import Image

    from ....training.corpus import Captioned

Change = Callable[["Image.Image", random.Random], "Image.Image"]
GROUNDS = ("#f5c84b", "#377dd2", "#46a050", "#dcdcdc", "#18181c")
PAIRS = ("same content, other style", "same group, other content", "other group")
SOFT = 40  # pixels of a picture that was made small and large again


class JudgeOptions(EvaluationOptions):
    """How many pairs the instruments are compared on."""

    pairs: int = option(300, label="Pairs", help="Pairs of pictures of each kind.", low=10, high=10_000)


class JudgeBench:
    """Ask the judge about real pictures that had no part in its training."""

    name = "judge"
    title = "The judge's error"
    options = JudgeOptions

    def run(self, options: JudgeOptions, place: Place) -> Iterator[Event]:
        rows = place.pictures.rows
        renderings = [row for row in rows if row.file in place.judge.unseen]
        contents = [row for row in rows if row.content in place.judge.unseen]
        if not contents:
            yield Notice(text="Unseen contents lie in the whole corpus only: build it with `intarsia corpus build`.")
        if options.quick:
            rng = random.Random(options.seed)
            renderings, contents = (rng.sample(group, min(150, len(group))) for group in (renderings, contents))
        for name, change in CHANGES.items():
            place.token.check()
            yield Stage(name="look", detail=name)
            self._look(name, change, renderings, contents, place)
        yield Stage(name="compare", detail="the independent instruments")
        _compare(renderings + contents, 40 if options.quick else options.pairs, options.seed, place)
        _time(renderings, place)

    def _look(
        self, name: str, change: Change, renderings: list[Captioned], contents: list[Captioned], place: Place
    ) -> None:
        key = f"look/{name}"
        if place.records.has(key):
            return
        judge, rng = place.judge, random.Random(name)
        seen = judge.embed([change(place.pictures.clear(row), rng) for row in renderings])
        scores, styles = judge.content_scores(seen), judge.style_scores(seen)
        right = [judge.contents.index(row.content) for row in renderings]
        ranks = [int((scores[i] > scores[i, j]).sum()) + 1 for i, j in enumerate(right)]
        style = [judge.styles[int(styles[i].argmax())] == row.style for i, row in enumerate(renderings)]
        place.records.add(
            key, kind="look", name=name, ranks=ranks, style=style, nearest=_nearest(contents, change, rng, place)
        )

    def summarise(self, options: JudgeOptions, place: Place) -> Summary:
        looks, pairs = place.records.rows("look"), place.records.rows("pair")
        figures: dict[str, float | int | str] = {}
        lines: list[tuple[str | int, ...]] = []
        for look in looks:
            first, five = [rank == 1 for rank in look["ranks"]], [rank <= 5 for rank in look["ranks"]]
            lines.append((look["name"], share(first), share(five), share(look["style"]), share(look["nearest"])))
            name = look["name"].replace(" ", "_")
            for part, hits in {"top1": first, "top5": five, "style": look["style"], "nearest": look["nearest"]}.items():
                figures[f"{name}_{part}"] = mean_spread([float(hit) for hit in hits])[0]
        count = (len(looks[0]["ranks"]), len(looks[0]["nearest"]))
        kinds = [[row for row in pairs if row["of"] == kind] for kind in PAIRS]
        names = {"judge": "judge, cosine", "lite0": "Lite0, cosine", "lpips": "ST-LPIPS, distance"}
        compared: list[tuple[str, ...]] = []
        for name, title in names.items():
            sign = -1 if name == "lpips" else 1
            agreement = rank_correlation([row["judge"] for row in pairs], [sign * row[name] for row in pairs])
            figures[f"agreement_{name}"] = agreement
            compared.append((title, *(shown([row[name] for row in kind]) for kind in kinds), f"{agreement:.2f}"))
        rate = place.records["speed"]["rate"]
        figures["pictures_per_second"] = rate
        return Summary(
            title=self.title,
            tables=(
                Table(
                    "Accuracy on unseen pictures",
                    ("shown as", "content first", "among first five", "style", "unseen contents, nearest"),
                    tuple(lines),
                    f"{count[0]} unseen renderings of known contents, among all {len(place.judge.contents)} contents "
                    f"and {len(place.judge.styles)} styles; {count[1]} pictures of contents never seen, by their "
                    "nearest neighbour among all contents, their own style left out. In brackets: 95 % interval.",
                ),
                Table(
                    "Do the instruments agree?",
                    ("instrument", *PAIRS, "rank correlation with the judge"),
                    tuple(compared),
                    f"Mean over {len(kinds[0])} pairs of each kind, one of each new to the judge; Spearman over all.",
                ),
            ),
            notes=(f"{rate:.0f} pictures per second on {place.model.device.type}.",),
            figures=figures,
        )


def _plain(picture: Image.Image, rng: random.Random) -> Image.Image:
    return picture  # the judge lays transparency on white


def _placed(picture: Image.Image, rng: random.Random) -> Image.Image:
    """Smaller, somewhere on a coloured ground."""
    from PIL import Image

    side = round(picture.width * rng.uniform(0.6, 0.95))
    ground = Image.new("RGB", picture.size, rng.choice(GROUNDS))
    place = (rng.randint(0, picture.width - side), rng.randint(0, picture.height - side))
    small = picture.resize((side, side), Image.Resampling.LANCZOS)
    ground.paste(small, place, small.getchannel("A"))
    return ground


def _soft(picture: Image.Image, rng: random.Random) -> Image.Image:
    """Without its finest detail, as small models draw."""
    from PIL import Image

    return picture.resize((SOFT, SOFT), Image.Resampling.BOX).resize(picture.size, Image.Resampling.BICUBIC)


CHANGES: dict[str, Change] = {"plain on white": _plain, "small on a coloured ground": _placed, "soft": _soft}


def _nearest(rows: Sequence[Captioned], change: Change, rng: random.Random, place: Place) -> list[bool]:
    """Is an unseen content, known only by its other renderings, nearer to those than to any other content?"""
    import torch
    from torch.nn import functional as F

    if not rows:
        return []
    judge = place.judge
    known = [i for i, content in enumerate(judge.contents) if content not in judge.unseen]
    seen = judge.embed([change(place.pictures.clear(row), rng) for row in rows]).content
    every = [row for row in place.pictures.rows if row.content in judge.unseen]
    clean = judge.embed([place.pictures.image(row) for row in every]).content
    contents = sorted({row.content for row in every})
    right: list[bool] = []
    for i, row in enumerate(rows):
        others = torch.stack(
            [
                F.normalize(
                    clean[[j for j, o in enumerate(every) if o.content == c and o.style != row.style]].mean(0), dim=0
                )
                for c in contents
            ]
        )
        best = float((others @ seen[i]).max())
        own = float(others[contents.index(row.content)] @ seen[i])
        right.append(own >= best and own > float((judge.content_prototypes[known] @ seen[i]).max()))
    return right


def _compare(rows: Sequence[Captioned], count: int, seed: int, place: Place) -> None:
    """Measure pairs of three kinds with three instruments; the first of each pair is new to the judge."""
    rng, real = random.Random(seed), [row for row in place.pictures.rows if row.group]
    for kind in PAIRS:
        pairs: list[tuple[Captioned, Captioned]] = []
        while len(pairs) < count:
            one, other = rng.choice(rows), rng.choice(real)
            if kind == PAIRS[0]:
                same = [row for row in place.pictures.of(content=one.content) if row.style != one.style]
                other = rng.choice(same) if same else one
            fits = (one.style != other.style, one.group == other.group, one.group != other.group)[PAIRS.index(kind)]
            if fits and (kind == PAIRS[0]) == (one.content == other.content):
                pairs.append((one, other))
        if place.records.has(f"pair/{kind}/0"):
            continue  # the first row of a kind is written last
        place.token.check()
        sides = [[place.pictures.image(pair[side]) for pair in pairs] for side in range(2)]
        seen = [place.judge.embed(side).content for side in sides]
        judged = (seen[0] * seen[1]).sum(1).tolist()
        features = [instruments.lite0(side) for side in sides]
        alike = instruments.cosine(*features).tolist()
        far = instruments.st_lpips(sides[0], sides[1]).tolist()
        for i, (a, b, c) in reversed(list(enumerate(zip(judged, alike, far, strict=True)))):
            place.records.add(f"pair/{kind}/{i}", kind="pair", of=kind, judge=a, lite0=b, lpips=c)


def _time(rows: Sequence[Captioned], place: Place) -> None:
    if place.records.has("speed"):
        return
    pictures = [place.pictures.image(row) for row in (list(rows) * 128)[:128]]
    place.judge.embed(pictures[:16])
    begun = time.perf_counter()
    place.judge.embed(pictures)
    place.records.add("speed", kind="speed", rate=len(pictures) / (time.perf_counter() - begun))


BENCH = JudgeBench()
