"""Front of several replicas: admission, balancing by HAProxy, states of the replicas, and collection of their usage.
"""
