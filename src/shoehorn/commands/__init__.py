"""Commands of `shoehorn`, one module each.

May import all rooms.
"""
