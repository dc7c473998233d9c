"""The file that ms-swift takes as a plugin, alone in its folder: ms-swift puts the folder on its path for imports."""
