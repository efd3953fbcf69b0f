"""The engine program: plans, fetches, starts and watches vLLM.

May import: deployment, runtime, planner, config, hardware, model, common.
"""
