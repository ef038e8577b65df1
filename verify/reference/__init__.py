"""The oracle that every engine is compared with; shares no arithmetic with `bake`."""
