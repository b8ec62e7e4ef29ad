"""What runs around a launcher and around each rank, so that a hang becomes an exit code and a restart."""
