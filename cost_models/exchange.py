"""What the exchange of a substituted region sends, per rank and step, the mean over ranks, in bytes.

Every rank sends its b rows' ids to each rank that needs them (L ids a row, over all receivers), and each rank sends
the other ranks' rows of the values that leave the region (w elements a row, over all senders); gradients come back.

A product with a table whose rows are divided sends rows of x and ids to the owners, and partial results back; gradients
go the same ways: w elements and L ids a row of the batch, over all owners and both directions (`OUTPUTS`).
"""

from descompiler.cost_models.symbols import L, N, b, i, s, w

IDS_IN = (N - 1) / N * b * i * L
VALUES_OUT_AND_BACK = 2 * (N - 1) / N * b * s * w
OUTPUTS = (N - 1) / N * b * (s * w + i * L)
