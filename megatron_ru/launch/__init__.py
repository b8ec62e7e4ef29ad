"""From one JobSpec to the script of a scheduler, whose ranks find RANK, LOCAL_RANK, WORLD_SIZE and a place to meet."""
