"""What stays of a driver that the cluster's head took with it: its results, and what it knew of them."""

from __future__ import annotations

import multiprocessing
import os
from pathlib import Path
from typing import Any

import pytest

from flashvideo.commands import on_workers
from flashvideo.commands.on_workers import LOST, Clip
from flashvideo.commands.terminal import DAMAGED


def lose(path: Path, damaged: Any) -> None:
    """A driver that makes one result of a damaged source, and ends with the head."""
    path.touch()
    damaged.value |= True
    os._exit(LOST)


@pytest.mark.parametrize("left", [0, 1])
def test_a_damaged_source_is_remembered_beyond_the_driver(
    left: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    clips = [Clip(f"{index}.mp4", tmp_path / f"{index}.mp4", None) for index in range(1 + left)]
    given = []

    def drive(
        _farm: Any, _folder: str, _prepare: Any, clips: list[Clip], damaged: Any, _show: Any, *, again: bool
    ) -> int:
        given.append(len(clips))
        if again:
            return DAMAGED if damaged.value else 0  # as `_Display.sum_up` does
        child = multiprocessing.get_context("spawn").Process(target=lose, args=(clips[0].target, damaged))
        child.start()
        child.join()
        return child.exitcode

    monkeypatch.setattr(on_workers, "_run_driver", drive)
    farm = on_workers.FarmOptions(None, None, cards=False)
    assert on_workers._run_drivers(farm, "", lambda: None, clips, on_workers.Display) == DAMAGED
    assert given == ([2, 1] if left else [1])
    assert "has ended. The run goes on" in capsys.readouterr().err
