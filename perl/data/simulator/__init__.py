"""The embedded source `coffee-simulator`: a shop, its customers, a mediocre agent and a gold judge.

Modules import only those before them: shop → state → acts → judge, agent, customer → dialogues → source.
"""
