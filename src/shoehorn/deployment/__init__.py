"""The one planning pipeline: settings + machine + model + disk -> plan.

May import: int4, store, planner, model, config, hardware, common.
"""
