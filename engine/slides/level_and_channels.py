"""Choose the level and the channels of a slide to segment, with the reasons."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from cellseg_batch.engine.errors import SlideError
from cellseg_batch.engine.slides.slide import Slide

# Role of the channels of a model of pictures in colour, which takes grey ones too.
LIGHT = ("rgb",)
# Usual names of the channel of a stain that binds to DNA.
_NUCLEAR = re.compile(r"dapi|hoechst|\bdna\b|_dna|dna_", re.IGNORECASE)


@dataclass(frozen=True)
class LevelChoice:
    """A level, its pixel size in µm (None if unknown) and the reason in words for the user."""

    level: int
    pixel_size_um: float | None
    reason: str


@dataclass(frozen=True)
class ChannelChoice:
    """Indices of one (grey), three (RGB) or any (stains) channels and the reason in words for the user."""

    indices: tuple[int, ...]
    reason: str


def choose_level(slide: Slide, level: int | None, pixel_size: float | None, model_um: float | None) -> LevelChoice:
    """Choose the level: that asked for, else that nearest to the model's pixel size, else the full resolution.

    Args:
        slide: the image; what is asked for it alone comes before ``level`` and ``pixel_size``.
        level: number of the user's level; None if the user named none.
        pixel_size: µm per px of level 0 from the user; None takes it from the metadata.
        model_um: µm per px that the model was trained at; None if unknown.

    Raises:
        SlideError: the slide has no such level.
    """
    count = len(slide.levels)
    level = level if slide.asked.level is None else slide.asked.level
    full = slide.asked.pixel_size or pixel_size or slide.pixel_size_um(0)
    base = slide.plane_shape(0)[1]
    sizes = [full * base / max(1, slide.plane_shape(i)[1]) if full else None for i in range(count)]
    if level is not None:
        if level >= count:
            raise SlideError(
                slide.location,
                expected=f"a level from 0 to {count - 1}",
                found=f"`level={level}`",
                remedy="see cellseg-batch info for the levels",
            )
        return LevelChoice(level, sizes[level], "asked for")
    if count == 1 and full and model_um is not None:
        differs = not math.isclose(full, model_um, rel_tol=0.01)
        return LevelChoice(0, full, "the only one" + differs * f", not rescaled to the model's {model_um:g} µm/px")
    known = [size for size in sizes if size is not None]
    if not known or model_um is None:
        return LevelChoice(0, full, "pixel size unknown, so full resolution" if not known else "full resolution")
    nearest = min(range(count), key=lambda i: (abs(math.log(known[i] / model_um)), i))
    return LevelChoice(nearest, known[nearest], f"nearest to the model's {model_um:g} µm/px")


def choose_channels(slide: Slide, channel: int | str | None, roles: tuple[str, ...] = LIGHT) -> ChannelChoice:
    """Choose the channels: the user's, else RGB if the image says so, else the DNA stain by name, else the first.

    A model of named stains gets one channel for each: the user's (``nuclei=DAPI,membrane=1``), else the one with the
    stain's name; for ``nuclei`` also the DNA stain.

    Args:
        slide: the image; what is asked for it alone comes before ``channel``.
        roles: roles of the model's channels; ``rgb`` and ``grey`` are no stains.
        channel: index or name of the user's channel; None if the user named none. A text of digits is a name if there
            is such a name, else an index.

    Raises:
        SlideError: the slide has no such channel, or several.
    """
    channel = channel if slide.asked.channel is None else slide.asked.channel
    if not set(roles) <= {*LIGHT, "grey"}:
        return _choose_stains(slide, channel, roles)
    if channel is not None:
        return ChannelChoice((_find_channel(slide, channel),), "asked for")
    count = slide.extent("c", 0)
    if slide.rgb and count >= 3:
        return ChannelChoice((0, 1, 2), "RGB")
    for index, name in enumerate(slide.channels[:count]):
        if _NUCLEAR.search(name):
            return ChannelChoice((index,), f"named {name}")
    return ChannelChoice((0,), "the only one" if count == 1 else "the first; no name says DNA")


def _choose_stains(slide: Slide, channel: int | str | None, roles: tuple[str, ...]) -> ChannelChoice:
    """Choose one channel for each role, as `choose_channels`."""
    text = "" if channel is None else str(channel)
    if len(roles) == 1 and text and not text.startswith(f"{roles[0]}="):
        text = f"{roles[0]}={text}"
    pairs = [part.partition("=") for part in text.split(",") if part]
    asked = {role.strip(): name.strip() for role, _, name in pairs}
    unknown = [role for role in asked if role not in roles or not asked[role]]
    if unknown or len(asked) < len(pairs):
        raise _unclear(slide, roles, f"`channel={text}`")
    found = {role: _find_channel(slide, name) for role, name in asked.items()}
    for role in roles:
        if role not in found:
            found[role] = _find_stain(slide, role, roles)
    reason = ", ".join(f"{role} {slide.channel_names([found[role]])[0]}" for role in roles)
    return ChannelChoice(tuple(found[role] for role in roles), reason)


def _find_stain(slide: Slide, role: str, roles: tuple[str, ...]) -> int:
    """Index of the only channel whose name says that it shows ``role``."""
    names = slide.channels[: slide.extent("c", 0)]
    exact = [index for index, name in enumerate(names) if name.lower() == role.lower()]
    nuclear = [index for index, name in enumerate(names) if role == "nuclei" and _NUCLEAR.search(name)]
    fitting = exact or nuclear
    if len(fitting) != 1:
        raise _unclear(slide, roles, f"{len(fitting)} channels of that name among {', '.join(names) or 'no names'}")
    return fitting[0]


def _unclear(slide: Slide, roles: tuple[str, ...], found: str) -> SlideError:
    example = ",".join(f"{role}={index}" for index, role in enumerate(roles))
    return SlideError(
        slide.location,
        expected=f"a channel for each of {', '.join(roles)}",
        found=found,
        remedy=f"say which, by names or indices: `channel={example}`",
    )


def _find_channel(slide: Slide, channel: int | str) -> int:
    """Index of the channel that the user named, as `choose_channels`."""
    count, text = slide.extent("c", 0), str(channel)
    names = list(slide.channels[:count])
    lower = [name.lower() for name in names]
    # The exact name comes first; capitals are minor otherwise.
    same = names if text in names else lower
    wanted = text if text in names else text.lower()
    found = [] if isinstance(channel, int) else [index for index, name in enumerate(same) if name == wanted]
    if text.isdecimal() and int(text) < count and int(text) not in found:
        found.append(int(text))
    if len(found) == 1:
        return found[0]
    if not found:
        raise SlideError(
            slide.location,
            expected=f"a channel index from 0 to {count - 1} or one of its channel names "
            f"({', '.join(slide.channels) or 'no names'})",
            found=f"`channel={channel}`",
            remedy="choose one of these" + slide.rgb * ", or leave it out to take red, green and blue",
        )
    meanings = [f"index {index} ({names[index] if index < len(names) else 'no name'})" for index in found]
    raise SlideError(
        slide.location,
        expected="an index or a name of one channel",
        found=f"`channel={channel}`, which means {' and '.join(meanings)}",
        remedy=f"write the index with a 0 before it, such as `channel=0{found[0]}`",
    )
