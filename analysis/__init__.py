from cpd.run.command import prepare_command

prepare_command()
