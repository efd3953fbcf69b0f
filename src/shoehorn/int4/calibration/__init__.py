"""Calibrated conversion: error feedback by the inputs that each linear layer sees for a calibration text.

May import what `int4` may.
"""
