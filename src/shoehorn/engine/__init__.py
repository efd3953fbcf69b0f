"""The engine program: plans, fetches the model, starts vLLM and supervises it.

May import: deployment, runtime, planner, model, config, hardware, common.
"""
