"""Building blocks for every room: errors, units, atomic files, locks, disk space, API error forms.

May import: nothing of Shoehorn.
"""
