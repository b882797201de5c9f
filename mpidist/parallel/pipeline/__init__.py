"""Pipeline parallelism: a model cut into stages, schedules as data, and the loop that runs them."""
