"""Pictures of one episode: the hall from above and the Gantt chart of the servers."""
