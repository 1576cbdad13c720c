"""Tables without a vocabulary: rows come with the ids that training sees, and go again. See docs/dynamic.md.

The key space of a table is divided into slices, of which each decides by itself, from its own ids: who is resident,
what was sighted, who has to go. So nothing changes when slices are divided among several owners.

`embedding` has the modules that users hold, `table` what a lookup and the end of a step do, `residence` who has a row,
`id_map` in which slot, `rows` the parameter that grows, `states` what optimisers keep for it, `admission` and
`eviction` the strategies, `saved` what a state dict has, by slot, `by_id` the state by id, of any slices, `static` and
`export` the ways in from and out to what doesn't grow; `owners` says which rank has which slices. Of `changes` of
tables `increments` makes checkpoints, and `deltas` a stream that a `replica` serves: `owned` is what one owner writes
of its tables, `parts` what a part has, `chains` the lists of parts, `stores` and `redis_store` where they lie. Start
with `Table.look_up`; docs/dynamic.md has the whole picture.

May import: errors, ops, optim, tensor_file.
"""

from descompiler.dynamic.admission import AfterSightings, Always, WithProbability
from descompiler.dynamic.deltas import Deltas
from descompiler.dynamic.embedding import DynamicEmbedding, DynamicEmbeddingBag
from descompiler.dynamic.eviction import Capacity, TimeToLive
from descompiler.dynamic.increments import Increments
from descompiler.dynamic.initial import Constant, Normal, Uniform
from descompiler.dynamic.redis_store import RedisStore
from descompiler.dynamic.replica import Replica
from descompiler.dynamic.static import from_embedding

__all__ = [
    "AfterSightings",
    "Always",
    "Capacity",
    "Constant",
    "Deltas",
    "DynamicEmbedding",
    "DynamicEmbeddingBag",
    "Increments",
    "Normal",
    "RedisStore",
    "Replica",
    "TimeToLive",
    "Uniform",
    "WithProbability",
    "from_embedding",
]
