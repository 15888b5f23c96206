"""Video files through PyAV: frames out one by one, frames in as segments, and one file of segments and sound.

The timestamps of the pictures and the packets of sound are those of the source, so that rate, length and lips stay.
"""

from .encoding import AUTO, BITS, CODECS, CRF, VideoFormat, encode_segment, read_comment, write_lossless
from .opening import VIDEO_ENDINGS, open_container, picture_track
from .pixels import UPRIGHT, Orientation, colour_matrix, orientation_of, upright_pixels
from .reading import VideoClip, is_animated, open_clip
from .writing import CONTAINERS, SOUNDS, check_container, write_video

__all__ = [
    "AUTO",
    "BITS",
    "CODECS",
    "CONTAINERS",
    "CRF",
    "SOUNDS",
    "UPRIGHT",
    "VIDEO_ENDINGS",
    "Orientation",
    "VideoClip",
    "VideoFormat",
    "check_container",
    "colour_matrix",
    "encode_segment",
    "is_animated",
    "open_clip",
    "open_container",
    "orientation_of",
    "picture_track",
    "read_comment",
    "upright_pixels",
    "write_lossless",
    "write_video",
]
