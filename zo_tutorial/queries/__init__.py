"""Loss queries: what one training step may ask of a model, counted, and several ways to answer.

A query's journey. An optimiser asks `LossQueries` (`loss_queries`, the face and the bill) for losses at perturbed
points of the batch that `start` has fixed. `choice` passes the question to the cheapest way that is valid, and compares
the first answers with those of the `loop`, the reference. The ways have one face (`way`):

- `loop` perturbs, runs and restores; `evaluation` runs model and criterion, the same each time, and `state` knows what
  a pass leaves behind in the model, to put it back.
- `batched` runs many perturbed copies in one call of vmap; `cost` says when that pays.
- `structured` computes the prefix of a layer once, in a `recording`, and moves the layer's output by a `sensitivity`.
  Where few weights are asked, it runs the suffix only (`suffix`, `cross_entropy`), for many outputs side by side and
  only what moves of them (`points`, `parts`, `rules`). Where many are, it sums over the samples first: of dense layers
  by values of each unit (`sums`, `rows`), of tensor layers and convolutions by the derivatives of the logits (`logits`,
  `jacobian`, `kinks`). Directions go through `directional`: as a `chain` of dense and tensor layers, or by rules
  too.

Several workers share what a step asks: its rounds, cut into units (`shared`), or the rows of the batch
(`rows_of_batch`).

Single moves, one coordinate after the other, look ahead in `descent`: on a path that is guessed, where a `walk` knows
the slope.
"""

from zo_tutorial.queries.choice import QUERY_MODES
from zo_tutorial.queries.cost import multiply_adds
from zo_tutorial.queries.evaluation import call
from zo_tutorial.queries.loss_queries import LossQueries
from zo_tutorial.queries.shared import Along, Coordinates
from zo_tutorial.queries.state import Snapshot

__all__ = ["QUERY_MODES", "Along", "Coordinates", "LossQueries", "Snapshot", "call", "multiply_adds"]
