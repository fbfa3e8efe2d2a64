"""Hides pandas from processes that tests start: moe_ray does not bring it, and ray.serve loads it where it is there.

Half a second of a core in each of the dozen processes of a server, which its users' servers do not take.
"""

raise ModuleNotFoundError("pandas is not there for processes that tests start", name="pandas")
