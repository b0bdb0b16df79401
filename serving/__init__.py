"""What shoppers call: model server, feedback collector, gateway, targets, and the engine that rolls versions out."""
