INSERT INTO sale VALUES (1, 1), (2, 1), (3, 2);
