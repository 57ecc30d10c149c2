"""The environment in the forms that other libraries expect: see docs/adapters.md.

`pettingzoo` and `gymnasium` need the extra `rl`; `jaxmarl` needs nothing more.
"""
