"""Light models, which lack what only rendering needs: the same bits, faster, in a sixth of the memory.

Of a task's model, 18 of 21 MB are textures and meshes of robot and furniture that nothing can touch. MuJoCo
computes the position of each such geom at every physics step, and compiles it from its file in every process.
"""

from __future__ import annotations

import mujoco


def light_model(path: str) -> mujoco.MjModel:
    """Compile an XML file without textures, materials and the geoms that `keeps_geom` rejects.

    Bodies, joints, sites, actuators and constraints keep their numbers and values (a test compares every field
    for all fifty tasks); the ids of geoms change, their names do not.
    """
    spec = mujoco.MjSpec.from_file(path)
    geoms = list(spec.geoms)
    filters = {(geom.contype, geom.conaffinity) for geom in geoms}
    for geom in geoms:
        geom.material = ""
        if not keeps_geom(geom.name, geom.contype, geom.conaffinity, filters):
            geom.delete()
    for site in spec.sites:
        site.material = ""
    meshes_in_use = {geom.meshname for geom in spec.geoms}
    for mesh in list(spec.meshes):
        if mesh.name not in meshes_in_use:
            mesh.delete()
    for asset in [*spec.materials, *spec.textures]:
        asset.delete()
    return spec.compile()


def keeps_geom(name: str, contype: int, conaffinity: int, filters: set[tuple[int, int]]) -> bool:
    """Whether a simulation needs a geom: code may look it up by its name, or it may touch another geom.

    Args:
        name: the geom's name, empty if it has none.
        contype, conaffinity: the geom's bit masks; two geoms may touch if one's type meets the other's affinity.
        filters: the pairs of masks that occur in the model.
    """
    return bool(name) or any(contype & affinity or kind & conaffinity for kind, affinity in filters)
