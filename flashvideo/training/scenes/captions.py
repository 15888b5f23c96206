"""Captions of procedural scenes in several wordings, and the way back from a prompt to what it asks for."""

from __future__ import annotations

import random
import re

from .vocabulary import BACKGROUNDS, COLOURS, SHAPES, SPEEDS, TEXTURES, Scene, Subject

_PLACES = {
    "hill": "over a green hill",
    "sea": "over a blue sea with waves",
    "desert": "over a yellow desert",
    "wall": "in front of a grey brick wall",
    "forest": "in front of a green forest",
    "night": "in a night sky with stars",
    "plain": "on a plain {} background",
    "page": "over a printed page",
}
_PLACE_WORDS = {
    "hill": "hill",
    "sea": "sea",
    "desert": "desert",
    "wall": "brick wall",
    "forest": "forest",
    "night": "night sky",
    "plain": "background",
    "page": "printed page",
}
_STILL = ("stays still", "does not move", "is standing still")
_CHANGES = {
    "rotates": ("rotates", "is rotating"),
    "grows": ("grows", "is growing"),
    "shrinks": ("shrinks", "is shrinking"),
}
# How the official prompts say the amount of motion: words before the sentence, without a space after the comma.
_MOTION_PREFIXES = {"still": "low motion,", "slowly": "medium motion,", "quickly": "high motion,"}

_DESCRIPTION = re.compile(rf"\b((?:(?:{'|'.join((*COLOURS, *TEXTURES))})\s+)+)({'|'.join(SHAPES)})\b")
_MOVE = re.compile(rf"\bmov(?:es?|ing)\s+(?:(?:{'|'.join(SPEEDS)})\s+)?(?:to\s+the\s+)?(left|right|up|down)\b")
_DIRECTIONS = (
    ("still", re.compile(r"\bstill\b|\bdoes not move\b")),
    ("rotates", re.compile(r"\brotat(?:es|ing)\b")),
    ("grows", re.compile(r"\bgrow(?:s|ing)\b")),
    ("shrinks", re.compile(r"\bshrink(?:s|ing)\b")),
)
_CAMERA = re.compile(r"\bcamera\s+(?:is\s+)?(static|pans left|pans right|zooms in)\b")


def caption(scene: Scene, seed: int, *, motion_prefix: bool = False) -> str:
    """One of the sentences that describe the scene; the seed chooses the wording.

    Every sentence names colour, shape, direction and background; most name the speed, and the texture unless it is
    plain. `motion_prefix` puts "low motion,", "medium motion," or "high motion," before it, as FlashVideo's do.
    """
    draw = random.Random(f"caption {seed}")
    place = _PLACES[scene.background].format(scene.background_colour)
    what = " and ".join(_sentence(subject, draw) for subject in scene.subjects)
    text = f"{place}, {what}" if draw.random() < 0.25 else f"{what} {place}"
    if scene.camera != "static":
        text += f", the camera {scene.camera}"
    elif draw.random() < 0.25:
        text += ", the camera is static"
    if not motion_prefix:
        return text
    first = scene.subjects[0]
    return _MOTION_PREFIXES["still" if first.direction == "still" else first.speed] + text


def parse_prompt(text: str) -> dict[str, str] | None:
    """What a prompt in the words of `caption` asks for: colour, shape and direction of its first subject.

    Also texture, speed, background and camera where it names them. None if one of the first three isn't there.
    """
    text = text.lower()
    found = _DESCRIPTION.search(text)
    if not found:
        return None
    words = found.group(1).split()
    colour = next((word for word in words if word in COLOURS), None)
    # A second subject's motion isn't the first one's: it stands after the second description.
    following = _DESCRIPTION.search(text, found.end())
    clause = text[found.end() : following.start() if following else None]
    direction = _direction(clause)
    if colour is None or direction is None:
        return None
    wanted = {"colour": colour, "shape": found.group(2), "direction": direction}
    camera = _CAMERA.search(text)
    optional = {
        "texture": next((word for word in words if word in TEXTURES), None),
        "speed": next((word for word in SPEEDS if word in clause), None),
        "background": next((name for name in BACKGROUNDS if _PLACE_WORDS[name] in text), None),
        "camera": camera.group(1) if camera else None,
    }
    return wanted | {name: value for name, value in optional.items() if value is not None}


def _direction(clause: str) -> str | None:
    sentence = clause.split("camera")[0]
    move = _MOVE.search(sentence)
    if move:
        return move.group(1)
    return next((name for name, pattern in _DIRECTIONS if pattern.search(sentence)), None)


def _sentence(subject: Subject, draw: random.Random) -> str:
    return f"{_description(subject, draw)} {_motion(subject, draw)}"


def _description(subject: Subject, draw: random.Random) -> str:
    words = [subject.colour]
    if subject.texture != "plain":
        words.insert(draw.randrange(2), subject.texture)
    elif draw.random() < 0.2:
        words.insert(0, "plain")
    article = "an" if words[0][0] in "aeiou" else "a"
    return " ".join((article, *words, subject.shape))


def _motion(subject: Subject, draw: random.Random) -> str:
    if subject.direction == "still":
        return draw.choice(_STILL)
    speed = subject.speed if draw.random() < 0.75 else ""
    if subject.direction in _CHANGES:
        phrase = f"{draw.choice(_CHANGES[subject.direction])} {speed}"
    else:
        to_the = "to the " if subject.direction in ("left", "right") and draw.random() < 0.5 else ""
        way = f"{to_the}{subject.direction}"
        phrase = draw.choice((f"moves {speed} {way}", f"is moving {way} {speed}", f"{speed} moves {way}"))
    return " ".join(phrase.split())
