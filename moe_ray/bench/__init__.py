"""The benchmark room: each bench measures, and publishes one report of plain rows."""
