"""What differs between two checkpoints, or between one and a pod: processes, descriptors, memory pages, files.

Works on snapshots alone, without a process in sight: the manifests, the page sums, the volumes.
"""

from podtree.diff.compare import Difference as Difference
from podtree.diff.compare import Snapshot as Snapshot
from podtree.diff.compare import diff as diff
