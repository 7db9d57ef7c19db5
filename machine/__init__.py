"""The ground floor: processes, sharding, memory, files, errors. Imports nothing of ours."""
