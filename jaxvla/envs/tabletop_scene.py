"""The tabletop scene as MJCF: a parallel-jaw gripper over a table with coloured blocks."""

NUM_BLOCKS = 3
BLOCK_HALF_M = 0.025
"""Half the edge of a block."""
REACH_M = 0.2
"""The workspace is the square |x|, |y| <= REACH_M on the table."""
FINGER_OPEN_M = 0.035
"""Travel of each finger from closed to open."""
TIP_BELOW_HAND_M = 0.075
"""Distance from the hand's origin down to the finger tips."""
PHYSICS_DT_S = 0.0125
SUBSTEPS = 4
"""Physics steps per control step: 20 Hz control."""

# Collision bits: table 1, blocks 2, fingers 4. Fingers are capsules because box-capsule
# is the cheapest pair in MJX that still grips a box along a line.
_FINGER = """
      <body name="finger_{side}" pos="0 {y} -0.03" gravcomp="1">
        <joint name="finger_{side}" type="slide" axis="0 {sign} 0" range="0 {travel}"
               damping="4" armature="0.05"/>
        <geom name="finger_{side}" type="capsule" fromto="0 0 0 0 0 -0.037" size="0.008"
              mass="0.03" friction="2" contype="4" conaffinity="3" material="dark"/>
      </body>"""

_BLOCK = """
    <body name="block_{i}" pos="{x} 0 {half}">
      <freejoint name="block_{i}"/>
      <geom name="block_{i}" type="box" size="{half} {half} {half}" mass="0.05" friction="1"
            contype="2" conaffinity="7"/>
    </body>"""

_SCENE = """
<mujoco model="tabletop">
  <option timestep="{dt}" iterations="2" ls_iterations="4" cone="pyramidal">
    <flag eulerdamp="disable"/>
  </option>
  <compiler autolimits="true"/>
  <custom>
    <numeric name="max_geom_pairs" data="6"/>
    <numeric name="max_contact_points" data="16"/>
  </custom>
  <visual>
    <headlight ambient="0.45 0.45 0.45" diffuse="0 0 0" specular="0 0 0"/>
    <map znear="0.005"/>
    <quality offsamples="0"/>
  </visual>
  <statistic extent="1" center="0 0 0.1"/>
  <asset>
    <texture type="skybox" builtin="flat" rgb1="0.5 0.5 0.5" rgb2="0.5 0.5 0.5"
             width="8" height="48"/>
    <material name="wood" rgba="0.5 0.5 0.5 1" specular="0" shininess="0"/>
    <material name="dark" rgba="0.2 0.2 0.22 1" specular="0" shininess="0"/>
    <material name="matt" rgba="0.5 0.5 0.5 1" specular="0" shininess="0"/>
    <material name="white" rgba="1 1 1 1" specular="0" shininess="0"/>
  </asset>
  <worldbody>
    <light directional="true" pos="0 0 2" dir="-0.35 0.25 -0.9" ambient="0 0 0"
           diffuse="0.6 0.6 0.6" specular="0 0 0" castshadow="false"/>
    <camera name="base" pos="0.36 0 0.52" xyaxes="0 1 0 -0.819 0 0.574" fovy="44"/>
    <geom name="table" type="plane" size="0.35 0.35 0.1" contype="1" conaffinity="6"
          friction="1" material="wood"/>
    <body name="zone" mocap="true" pos="0 0 0.001">
      <geom name="zone" type="box" size="0.045 0.045 0.001" contype="0" conaffinity="0"
            mass="0" material="white"/>
    </body>
    <body name="hand" pos="0 0 0.2" gravcomp="1">
      <joint name="x" type="slide" axis="1 0 0" damping="50" armature="1"/>
      <joint name="y" type="slide" axis="0 1 0" damping="50" armature="1"/>
      <joint name="z" type="slide" axis="0 0 1" damping="50" armature="1"/>
      <camera name="wrist" pos="0.09 0 0.05" xyaxes="0 1 0 -0.85 0 0.53" fovy="75"/>
      <geom name="hand" type="box" size="0.008 0.045 0.008" pos="0 0 -0.01" mass="0.3"
            contype="0" conaffinity="0" material="dark"/>
      {fingers}
    </body>
    {blocks}
  </worldbody>
  <actuator>
    <position joint="x" kp="1000"/>
    <position joint="y" kp="1000"/>
    <position joint="z" kp="1000"/>
    <position joint="finger_left" kp="80" ctrlrange="0 {travel}"/>
    <position joint="finger_right" kp="80" ctrlrange="0 {travel}"/>
  </actuator>
</mujoco>"""


def scene_xml() -> str:
    """MJCF of the scene: 4 moving parts of the gripper, NUM_BLOCKS free blocks, a zone marker."""
    fingers = "".join(
        _FINGER.format(side=side, sign=sign, y=0.009 * sign, travel=FINGER_OPEN_M)
        for side, sign in (("left", 1), ("right", -1))
    )
    blocks = "".join(
        _BLOCK.format(i=i, x=0.12 * (i - 1), half=BLOCK_HALF_M) for i in range(NUM_BLOCKS)
    )
    return _SCENE.format(dt=PHYSICS_DT_S, fingers=fingers, blocks=blocks, travel=FINGER_OPEN_M)
