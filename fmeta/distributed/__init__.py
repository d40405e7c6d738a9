"""Many processes: who works on which tasks, and the few numbers that they tell each other."""

from fmeta.distributed._agree import broadcast_tree, check_same
from fmeta.distributed._joined import joined
from fmeta.distributed._mean import all_reduce_mean, sum_tree
from fmeta.distributed._ranks import RankLost, Ranks
from fmeta.distributed._share import Share, dealt

__all__ = [
    "RankLost",
    "Ranks",
    "Share",
    "all_reduce_mean",
    "broadcast_tree",
    "check_same",
    "dealt",
    "joined",
    "sum_tree",
]
