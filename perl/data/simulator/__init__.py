"""The embedded source `coffee-simulator`: a shop, its customers, a mediocre agent and a gold judge.

shop → state → acts → judge, agent, customer → dialogues → source, and imports run that way.
"""
