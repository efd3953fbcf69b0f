"""The one planning pipeline: settings + machine + model + disk -> `Deployment` -> plan.

`inputs.gather` collects everything that a plan depends on; `plan.plan_deployment` plans it. The CLI and the engine
program call both and nothing below them.
May import: int4, store, planner, model, config, hardware, common.
"""
