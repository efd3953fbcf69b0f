"""Remote model repositories: listing and verified download.

May import: config, common.
"""
