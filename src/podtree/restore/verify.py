"""What can be seen of an image without bringing it back to life."""

from __future__ import annotations

import os
from pathlib import Path

from podtree.image import manifest as manifest_file
from podtree.image import verify
from podtree.restore import pagecheck, plan
from podtree.restore.pod import check_machine
from podtree.restore.validate import Bounds, confine, explained


def verify_image(directory: Path, bounds: Bounds) -> None:
    """See that a pod can be begun from an image here, within `bounds`: all but the pages that would come in later.

    Raises Damaged, RestoreFailed, Unsupported.
    """
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        manifest = manifest_file.load(fd)
        check_machine(manifest)
        manifest = confine(manifest, bounds)
        plan.plan_image(manifest)
        pagecheck.compare(fd, pagecheck.filled_at_once(fd, manifest))
        verify.verify_shared(fd, manifest)
    except Exception as error:
        raise explained(error) from error
    finally:
        os.close(fd)
