INSERT INTO note VALUES (0, 'welcome');
