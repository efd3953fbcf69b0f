"""Planning, pure: inputs -> a plan or a refusal.

May import: model, config, hardware, common.
"""
