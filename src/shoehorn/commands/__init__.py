"""Commands of `shoehorn`, one module each.

May import: every other room.
"""
