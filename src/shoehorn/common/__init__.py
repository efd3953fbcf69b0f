"""Parts that every room may use: errors, units, atomic files, locks, disk space, API error forms.

May import: nothing of Shoehorn.
"""
