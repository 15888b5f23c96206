"""Video files through PyAV: frames out one by one, frames in as segments, and one file of segments and sound.

The timestamps of the pictures and the packets of sound are those of the source, so that rate, length and lips stay.
"""

from .alpha import split_alpha
from .encoding import AUTO, BITS, CODECS, CRF, VideoFormat, encode_segment, read_comment, write_lossless
from .opening import VIDEO_ENDINGS, open_container, picture_track, texts
from .orientation import UPRIGHT, Orientation, orientation_of
from .picture_metadata import is_premultiplied, with_metadata
from .pixels import colour_matrix, upright_pixels
from .reading import VideoClip, is_animated, open_clip
from .sequences import (
    SEQUENCES,
    PictureSequence,
    SequenceFormat,
    encode_pictures,
    is_pattern,
    open_sequence,
    picture_name,
    sequence_identity,
    sequence_numbers,
)
from .stills import DEEP_ENDINGS, deep_file, read_deep
from .writing import CONTAINERS, SOUNDS, check_codec, check_container, write_video

__all__ = [
    "AUTO",
    "BITS",
    "CODECS",
    "CONTAINERS",
    "CRF",
    "DEEP_ENDINGS",
    "SEQUENCES",
    "SOUNDS",
    "UPRIGHT",
    "VIDEO_ENDINGS",
    "Orientation",
    "PictureSequence",
    "SequenceFormat",
    "VideoClip",
    "VideoFormat",
    "check_codec",
    "check_container",
    "colour_matrix",
    "deep_file",
    "encode_pictures",
    "encode_segment",
    "is_animated",
    "is_pattern",
    "is_premultiplied",
    "open_clip",
    "open_container",
    "open_sequence",
    "orientation_of",
    "picture_name",
    "picture_track",
    "read_comment",
    "read_deep",
    "sequence_identity",
    "sequence_numbers",
    "split_alpha",
    "texts",
    "upright_pixels",
    "with_metadata",
    "write_lossless",
    "write_video",
]
