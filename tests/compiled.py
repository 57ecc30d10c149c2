"""The functions of an environment, each one program: by itself every operation of them would be compiled."""

import equinox as eqx

from gmel.simulator.environment import Environment

reset = eqx.filter_jit(Environment.reset)
observe = eqx.filter_jit(Environment.observe)
project = eqx.filter_jit(Environment.project)
step = eqx.filter_jit(Environment.step)
