"""Run any ComfyUI workflow file without a browser.

    python scripts/run_workflow.py WORKFLOW.json [--set NODE.INPUT=VALUE ...] [--input FILE ...] [--out FOLDER]

NODE is a node's id or title. `--input` copies a file to where load nodes find it. Uses the private ComfyUI in `.bed/`,
and makes it first if need be.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from pathlib import Path

import set_up
from harness.bed import CANCELLED, ROOT, Bed, say, seconds, stop_on_terminate


def main() -> int:
    """Command line; returns the exit code: 0, or 1 with a message that a user can act on."""
    arguments = _arguments()
    set_up.enter(__file__)
    # Only the bed's Python, in which this now runs, has the packages that the following modules need.
    from harness.comfy_client import RejectedWorkflow
    from harness.comfy_server import ComfyServer, ServerError
    from harness.workflow_runs import copy_files, run_workflow

    stop_on_terminate()
    try:
        with ComfyServer(_bed(), _bed().base) as server:
            for path in arguments.input:
                shutil.copy2(path, server.input)
            run = run_workflow(server, arguments.workflow, say, settings=arguments.set)
            for path in copy_files(run, arguments.out):
                say(f"Saved {path}")
        say(f"Done in {seconds(run.seconds)}.")
    except (RejectedWorkflow, ServerError, RuntimeError, OSError) as error:
        say(f"\nStopped. {error}")
        return 1
    except KeyboardInterrupt:
        say("\nCancelled.")
        return CANCELLED
    return 0


def _bed() -> Bed:
    bed = Bed.load()
    if bed is None:
        raise RuntimeError("The private ComfyUI in .bed/ is not complete: run scripts/set_up.py.")
    return bed


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Run a ComfyUI workflow file without a browser.")
    parser.add_argument("workflow", type=Path, help="workflow file as ComfyUI saves or exports it")
    parser.add_argument("--set", action="append", default=[], metavar="NODE.INPUT=VALUE", help="change one input")
    parser.add_argument("--input", action="append", default=[], type=Path, metavar="FILE", help="file for a load node")
    parser.add_argument("--out", type=Path, default=ROOT / "demo" / "runs", help="folder for the results")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
