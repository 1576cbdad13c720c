"""The command line: ``descompiler cost``, ``plan``, ``verify``, ...; see docs/cli.md.

`app` has the commands, `options` what they take, `loading` finds the models they name, `output` prints. Start with
`app`.

May import: everything.
"""
