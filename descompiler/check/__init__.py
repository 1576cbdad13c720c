"""Proofs and measurements of a compiled model.

`verify` is the proof, `compare` one rank's steps, `judge` what it compares, `objective` the loss, `trials` what a
thorough proof tries and `thorough` how; `processes` local ranks to do it on. `audit` holds predicted bytes and times
against measured ones, `calibrate` measures a cluster. Start with `verify.verify`.

May import: `descompiler.compiler` and below.
"""
